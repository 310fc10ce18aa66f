# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""etrace_evolve, then etrace_grad in one program, of ops without a closed form of the trace."""

import gc
import re

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity.harness import BATCH, assert_close, assert_same_states, both, pair, start
from tests.parity.nets import N_IN, NETS, N
from tests.parity.test_transformed import net
from traceops.benchmarks import measure
from traceops.host.param_dim import ParamDimRule

pytestmark = pytest.mark.usefixtures('float64')
MIXED = net('normalised', states=2)


def warm_up_and_learn(run, then=lambda run: None):
    run.learner.etrace_evolve(run.x)
    between = then(run)
    return run.eager_grad(), between


def weights_change(run):
    for state in run.model.states(brainstate.ParamState).values():
        state.value = jax.tree.map(lambda a: 0.9 * a + 0.01, state.value)


def trace_changes(run):
    for state in run.inner.etrace_bwg.values():
        state.value = jax.tree.map(lambda a: 2. * a, state.value)


def trace_is_read(run):
    return jax.tree.leaves(run.inner.get_etrace_of(run.model.w))


@pytest.fixture
def recalled(monkeypatch):
    """How often the steps of a warm-up were gone through in the place of their trace."""
    found = []
    original = ParamDimRule._of_steps_before

    def counted(*args):
        found.append(args[1])
        return original(*args)
    monkeypatch.setattr(ParamDimRule, '_of_steps_before', counted)
    return found


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize('one, vmap, then, used, options', [
    _slow(MIXED, False, lambda run: None, True, {}), (MIXED, True, lambda run: None, True, {}),
    (MIXED, False, trace_is_read, True, {}), (MIXED, False, weights_change, False, {}),
    (MIXED, False, trace_changes, False, {}),
    _slow(NETS['conv'], False, lambda run: None, True, {}),
    _slow(NETS['einsum'], False, lambda run: None, True, {}),
    _slow(MIXED, True, lambda run: None, False, {'window': 3}),
    _slow(MIXED, False, lambda run: None, False, {'memory_budget': 4000}),
], ids=['batch', 'vmap', 'read', 'other-weights', 'other-trace', 'conv', 'einsum', 'windows',
        'budget'])
def test_as_upstream(recalled, one, vmap, then, used, options):
    """Twice: from a zero trace, and from one that the call before left."""
    want, got = pair(one, 'd_rtrl', 7, vmap, **options)
    program = [brainstate.transform.jit(lambda run=run: warm_up_and_learn(run, then))
               for run in (want, got)]
    for _ in range(2):
        a, b = both(want, got, lambda run: program[run is got]())
        assert_close(a, b, 1e-10, nonzero=True)
        assert_same_states(want, got, 1e-10)
    assert bool(recalled) == used
    assert ('gone through again' in str(traceops.explain(got.learner))) == used


@pytest.mark.slow
@pytest.mark.parametrize('rule, options, used', [
    ('d_rtrl', {'vjp_method': 'multi-step'}, True), ('eprop', {}, False)])
def test_other_signals(recalled, rule, options, used):
    want, got = (start(way, MIXED, rule, 7, **options)
                 for way in (braintrace.compile, traceops.compile))
    a, b = both(want, got, lambda run: brainstate.transform.jit(
        lambda: warm_up_and_learn(run))())
    assert_close(a, b, 1e-10, nonzero=True)
    assert_same_states(want, got, 1e-10)
    assert bool(recalled) == used


@pytest.mark.parametrize('vmap', [_slow(False), True])
def test_no_trace_is_formed_that_nobody_reads(vmap):
    """The learner is made in the program, which returns its gradient: no array of its trace."""
    def train():
        run = start(traceops.compile, MIXED, 'd_rtrl', 7, vmap)
        return warm_up_and_learn(run)[0][0]

    def traces(keep):
        step, states = measure.pure(train)
        text = jax.jit(lambda states: step(states)[keep]).lower(states).compile().as_text()
        loops = [line for line in text.splitlines() if ' while(' in line]
        assert loops
        return [line for line in loops if re.search(rf'\[{BATCH},{N_IN + N},{N},2\]', line)]
    assert not traces(0)


def test_what_is_remembered_ends_with_the_program():
    run = start(traceops.compile, MIXED, 'd_rtrl', 7)
    brainstate.transform.jit(lambda: run.learner.etrace_evolve(run.x))()
    gc.collect()
    assert run.inner._warm_up._steps is None
    run.learner.etrace_evolve(run.x)            # outside of a program nothing is
    assert run.inner._warm_up._steps is None


@pytest.mark.slow
def test_the_same_as_one_masked_gradient():
    """What explain advises where no call goes on from the one before."""
    want = start(braintrace.compile, MIXED, 'd_rtrl', 7)
    first, xs = jnp.concatenate([want.x, want.x]), 7
    grads = brainstate.transform.jit(lambda: warm_up_and_learn(want)[0][0])()
    with traceops.configured(carry_trace=False):
        got = start(traceops.compile, MIXED, 'd_rtrl', 7)
    ys = jnp.concatenate([got.y, got.y])
    masked = brainstate.transform.jit(lambda: got.learner.etrace_grad(
        first, ys, step_fn=got.loss, mask=jnp.arange(2 * xs) >= xs))()
    assert_close(grads, masked, 1e-10, nonzero=True)
    assert np.isfinite(float(sum(jnp.abs(g).max() for g in jax.tree.leaves(masked))))
