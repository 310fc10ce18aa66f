# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What is the same at every step and expensive is computed once a call, before its windows."""

import brainevent
import brainstate
import braintools
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity.harness import assert_close

N, B, T = 10, 3, 9


class Net(brainstate.nn.Module):
    """Spiking, through frozen synapses, of which a gain is a product of constants too.

    ``state``: they are parameters, whose values are known when the program runs.
    """

    def __init__(self, state):
        super().__init__()
        rng = np.random.default_rng(0)
        frozen = rng.normal(size=(N, N)) * (rng.random((N, N)) < 0.4)
        self.frozen = brainevent.CSR.fromdense(jnp.asarray(frozen, jnp.float32))
        self.gain = jnp.asarray(rng.normal(size=(N, N)), jnp.float32)
        if state:
            self.gain = brainstate.ParamState(self.gain)
        self.inputs = braintrace.nn.Linear(4, N, w_init=braintools.init.Normal(0., 1.))

    def init_state(self, batch_size=B, **kwargs):
        self.v = brainstate.HiddenState(jnp.zeros((batch_size, N)))

    def update(self, x):
        spikes = braintools.surrogate.ReluGrad()(self.v.value - 1.)
        gain = getattr(self.gain, 'value', self.gain)
        level = jnp.abs(jnp.ones((B, N)) @ gain) @ self.frozen
        self.v.value = 0.8 * self.v.value + spikes @ self.frozen + self.inputs(x) + 0.1 * level
        return self.v.value


def _gradient(compiler, rule, state):
    brainstate.random.seed(0)
    xs = jnp.asarray(np.random.default_rng(1).normal(size=(T, B, 4)), jnp.float32)
    options = {'decay_or_rank': 0.9} if rule == 'ES_D_RTRL' else {}
    learner = compiler(Net(state), rule, xs[0], batch_size=B, **options)
    return lambda: learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).mean())


def _eqns(jaxpr, loops=0):
    for eqn in jaxpr.eqns:
        yield eqn, loops
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                yield from _eqns(inner, loops + (eqn.primitive.name in ('scan', 'while')))


@pytest.mark.parametrize('rule, carry, state, at_once', [
    ('ES_D_RTRL', True, True, False), ('D_RTRL', True, True, False),
    ('D_RTRL', False, True, False), ('ES_D_RTRL', True, False, False),
    pytest.param('ES_D_RTRL', True, True, True, marks=pytest.mark.slow),
    ('D_RTRL', False, True, True)])
def test_once_a_call(rule, carry, state, at_once):
    """Or not in the program at all, if what they follow from is known before it runs."""
    with traceops.configured(window=3, carry_trace=carry, two_phase=at_once):
        call = _gradient(traceops.compile, rule, state)
    closed, _ = brainstate.transform.make_jaxpr(call)()
    # the gain's product is the only one with a constant of ones
    found = [loops for eqn, loops in _eqns(closed.jaxpr) if eqn.primitive.name == 'dot_general'
             and [v.aval.shape for v in eqn.invars] == [(B, N), (N, N)]]
    assert set(found) == ({0} if state else set()), found
    want = brainstate.transform.jit(_gradient(braintrace.compile, rule, state))()
    assert_close(want, brainstate.transform.jit(call)(), 1e-5, nonzero=True)
