# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Upstream's results for shapes and options that nobody chose (hypothesis, the same every run)."""

import warnings

import brainstate
import braintrace
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import traceops
from tests.parity.harness import RULES, Run, assert_close, assert_same_states, both, jitted

SEARCH = dict(max_examples=4, derandomize=True, deadline=None, database=None,
              suppress_health_check=[HealthCheck.function_scoped_fixture])


class Layer(brainstate.nn.Module):
    """``states`` hidden states per neuron, a bias or none, and a parameter that is not traced."""

    def __init__(self, n_in, n, states, bias):
        super().__init__()
        self.size, self.states_of = (n,), states
        self.w = brainstate.ParamState(brainstate.random.randn(n_in + n, n) * .6)
        self.b = brainstate.ParamState(brainstate.random.randn(n)) if bias else None
        self.plain = brainstate.ParamState(brainstate.random.randn(n))

    def init_state(self, batch_size=None, **kwargs):
        size = self.size if batch_size is None else (batch_size, *self.size)
        self.hs = [brainstate.HiddenState(jnp.zeros(size)) for _ in range(self.states_of)]

    def update(self, x):
        old = [h.value for h in self.hs]
        rows = jnp.concatenate([jnp.broadcast_to(x, (*old[0].shape[:-1], x.shape[-1])), old[0]], -1)
        y = braintrace.matmul(rows, self.w.value, None if self.b is None else self.b.value)
        for i, h in enumerate(self.hs):
            h.value = 0.7 * old[i] + jnp.tanh(y + self.plain.value * old[i - 1]) / (i + 1)
        return sum(h.value for h in self.hs).mean(-1)


@st.composite
def calls(draw):
    """A net, its data, a rule, and a call of ``etrace_grad``."""
    T = draw(st.integers(2, 9))
    weights = st.sampled_from([0., 1., 0.25, 3.])
    return dict(
        T=T, batch=draw(st.integers(1, 4)), n_in=draw(st.integers(1, 4)),
        n=draw(st.integers(1, 6)), states=draw(st.integers(1, 4)), bias=draw(st.booleans()),
        rule=draw(st.sampled_from(['d_rtrl', 'es', 'es-pair', 'eprop', 'three-factor'])),
        vmap=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.integers(1, T))),
        options=dict(
            mask=draw(st.one_of(st.none(), st.lists(weights, min_size=T, max_size=T))),
            reduction=draw(st.sampled_from(['mean', 'sum'])),
            loss_output=draw(st.sampled_from(['per_step', 'masked', 'scalar'])),
            return_value=draw(st.booleans()), has_aux=draw(st.booleans()),
            chunk_size=draw(st.sampled_from([None, 1]))),
        weights=draw(st.sampled_from(['all', 'w', 'plain'])), repeat=draw(st.integers(1, 2)))


def make(compiler, case):
    brainstate.random.seed(case['n'])
    model = Layer(case['n_in'], case['n'], case['states'], case['bias'])
    rng = np.random.RandomState(case['T'])
    x = jnp.asarray(rng.randn(case['T'], case['batch'], case['n_in']))
    y = jnp.asarray(rng.randn(case['T'], case['batch']))
    cls, options = RULES[case['rule']]
    return Run(compiler(model, cls, x[0], batch_size=case['batch'], vmap=case['vmap'], **options),
               model, x, y)


def call(run, case):
    def step(data, y):
        out = run.learner(data['x'])
        loss = ((out - y) ** 2).mean()
        return (loss, {'out': out}) if case['options']['has_aux'] else loss
    options = dict(case['options'])
    if options['mask'] is not None:
        options['mask'] = jnp.asarray(options['mask'])
    if case['weights'] != 'all':
        options['weights'] = {'mine': getattr(run.model, case['weights'])}
    return run.learner.etrace_grad({'x': run.x}, run.y, step_fn=step, **options)


@settings(**SEARCH)
@given(case=calls())
def test_any_call(float64, case):
    if case['vmap'] and case['rule'] == 'eprop':        # upstream leaks a tracer there
        case = {**case, 'vmap': False}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        upstream = make(braintrace.compile, case)
        with traceops.configured(window=case['window']):
            ours = make(traceops.compile, case)
    for _ in range(case['repeat']):
        want, got = both(upstream, ours, jitted(lambda run: call(run, case)))
        assert_close(want, got, 1e-10)
        assert_same_states(upstream, ours, 1e-10)
