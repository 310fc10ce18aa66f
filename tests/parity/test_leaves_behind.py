# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a call leaves for the next one, good or refused, in each way to drive a learner."""

import contextlib
import re
import traceback
import warnings

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity.harness import (
    BATCH,
    RULES,
    Run,
    assert_close,
    assert_same_states,
    both,
    pair,
    programs,
    start,
)
from tests.parity.nets import NETS
from tests.parity.test_calls import BAD

pytestmark = pytest.mark.usefixtures('compiled_quickly')

TOLERANCE = 1e-10
ALIF = NETS['alif']


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


@pytest.mark.parametrize('rule', ['d_rtrl', 'es', 'eprop'])
def test_get_etrace_of(float64, rule):
    upstream, ours = pair(ALIF, rule, 7, window=3)
    want, got = both(upstream, ours, lambda run: run.grad())
    assert_close(want, got, TOLERANCE, nonzero=True)
    want, got = (run.inner.get_etrace_of(run.model.linear.weight) for run in (upstream, ours))
    def values(found):
        return [jax.tree.leaves(part) for part in found] if isinstance(found, tuple) else found
    assert_close(jax.tree.leaves(values(want)), jax.tree.leaves(values(got)), TOLERANCE,
                 nonzero=True)


@pytest.mark.parametrize(('rule', 'vmap'), [('d_rtrl', True), ('es', False)])
def test_a_call_brings_no_state_of_its_own(rule, vmap):
    """What transformations around it carry, compile and copy is what they do for upstream."""
    upstream, ours = pair(ALIF, rule, 7, vmap, window=3)
    for call in (Run.eager_grad, lambda run: run.learner.etrace_evolve(run.x)):
        carried = [brainstate.transform.make_jaxpr(lambda run=run, call=call: call(run))()[1]
                   for run in (upstream, ours)]
        shapes = [sorted(jax.tree.map(jnp.shape, jax.tree.leaves([s.value for s in states])))
                  for states in carried]
        assert shapes[0] == shapes[1] and len(carried[0]) == len(carried[1]) > 5


def test_the_warm_up_correction_ends_where_upstream_ends_it(float64, monkeypatch):
    """The 1000th step, inside a window; so slow a decay that the correction is still felt."""
    monkeypatch.setitem(RULES, 'es', (braintrace.ES_D_RTRL, {'decay_or_rank': 0.999}))
    upstream, ours = pair(ALIF, 'es', 7, window=3)
    for run in (upstream, ours):
        run.inner.running_index.value = jnp.full_like(run.inner.running_index.value, 995)
    want, got = both(upstream, ours, lambda run: run.grad())
    assert_close(want, got, TOLERANCE, nonzero=True)
    assert_same_states(upstream, ours, TOLERANCE)
    assert int(ours.inner.running_index.value) == 1002


@pytest.mark.parametrize('start', [5, pytest.param(-5, marks=pytest.mark.slow)])
def test_the_running_index_may_be_read_in_the_step(float64, start):
    """And ends where upstream's does, from wherever it begins."""
    upstream, ours = pair(ALIF, 'd_rtrl', 7, window=3)

    def read(run):
        def loss(x, y):
            return run.loss(x, y), run.inner.running_index.value
        return run.learner.etrace_grad(run.x, run.y, step_fn=loss, has_aux=True)

    for run in (upstream, ours):
        run.inner.running_index.value = jnp.full_like(run.inner.running_index.value, start)
    for call in (read, Run.grad):
        want, got = both(upstream, ours, call)
        assert_close(want, got, TOLERANCE, nonzero=True)
        assert_same_states(upstream, ours, TOLERANCE)
    assert 'per window' in str(traceops.explain(ours.inner))


@pytest.mark.parametrize('rule', ['d_rtrl', pytest.param('es', marks=pytest.mark.slow)])
def test_without_a_batch(float64, rule):
    """``batch_size=None``: no axis but the net's own."""
    upstream = start(braintrace.compile, ALIF, rule, 7, batched=False)
    with traceops.configured(window=3):
        ours = start(traceops.compile, ALIF, rule, 7, batched=False)
    assert ours.x.ndim == 2
    grad = programs(upstream, ours)
    for _ in range(2):
        want, got = both(upstream, ours, grad)
        assert_close(want, got, TOLERANCE, nonzero=True)
        assert_same_states(upstream, ours, TOLERANCE)
    assert ours.inner._last_call[0] == 'window'


@pytest.mark.parametrize('rule', ['d_rtrl', 'es'])
def test_a_budget_chooses_the_window_and_no_result_depends_on_it(float64, rule):
    with traceops.configured(window=None, memory_budget='6KiB'):
        ours = start(traceops.compile, ALIF, rule, 50)
    upstream = start(braintrace.compile, ALIF, rule, 50)
    want, got = both(upstream, ours, lambda run: run.grad())
    assert_close(want, got, TOLERANCE, nonzero=True)
    assert_same_states(upstream, ours, TOLERANCE)
    engine, text = ours.inner._last_call
    assert engine == 'window' and 1 <= int(text.split()[0]) < 50


@pytest.mark.parametrize('rule, options, reason', [
    ('snap', {'n': 2}, 'sparse_n'), ('uoro', {}, 'an engine of its own'),
    ('rounded', {'trace_dtype': 'bfloat16'}, 'trace_dtype'),
])
def test_what_upstream_serves_is_upstreams_to_the_last_bit(rule, options, reason):
    cls = {'snap': braintrace.SnAp, 'uoro': braintrace.UORO, 'rounded': braintrace.D_RTRL}[rule]
    found = {}
    for compiler in (braintrace.compile, traceops.compile):
        brainstate.random.seed(0)
        model = NETS['vanilla'].make()
        x = NETS['vanilla'].inputs(6, BATCH)
        learner = compiler(model, cls, x[0], batch_size=BATCH, **options)
        run = Run(learner, model, x, jnp.ones((6, BATCH, 2)))
        brainstate.random.seed(1)
        found[compiler] = run.grad(), run.states()
    jax.tree.map(np.testing.assert_array_equal, *found.values())
    rows = traceops.explain(learner).rows
    assert rows and all(r.engine == 'upstream' and reason in r.reason for r in rows)


def test_a_bootstrapped_signal_is_upstreams_to_the_last_bit():
    """DNI: chunks of two steps, after each of which an estimate of the future is injected."""
    found, plain = [], []
    for installed in (contextlib.nullcontext(), traceops.enabled()):
        with installed:
            brainstate.random.seed(0)
            model, x = NETS['vanilla'].make(), NETS['vanilla'].inputs(6, BATCH)
            brainstate.nn.init_all_states(model, batch_size=BATCH)
            learner = braintrace.DNI(model)
            learner.compile_graph(braintrace.MultiStepData(x[:2]))
        learner.init_etrace_state()
        estimate = braintrace.SyntheticGradient(learner.group_signal_shapes())
        learner.attach_synthesizer(estimate)
        run = Run(learner, model, x, jnp.ones((6, BATCH, 2)))
        run.loss = lambda x, y, learner=learner: (
            (learner(braintrace.MultiStepData(x)) - y) ** 2).mean((1, 2))
        before = {k: st.value for k, st in model.states().items()}
        plain.append(run.grad(chunk_size=2)[0])
        for k, st in model.states().items():
            st.value = before[k]
        for st in estimate.states(brainstate.ParamState).values():
            st.value = jax.tree.map(lambda a: a + .1, st.value)
        found.append((run.grad(chunk_size=2), run.states()))
    jax.tree.map(np.testing.assert_array_equal, *plain)
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (plain[1], found[1][0][0])),
                                              strict=True))
    (row,) = traceops.explain(learner).rows
    assert row.engine == 'upstream' and 'injects a cotangent' in row.reason


@pytest.mark.parametrize('name, engine', [('chunks of two', 'per-step'), ('one', 'window')])
def test_evolve_with_chunk_size(float64, name, engine):
    upstream, ours = pair(ALIF, 'd_rtrl', 6)
    size = {'chunks of two': 2, 'one': 1}[name]
    want, got = both(upstream, ours, lambda run: run.learner.etrace_evolve(
        run.x, chunk_size=size, return_outputs=True))
    assert_close(want, got, TOLERANCE, nonzero=True)
    assert_same_states(upstream, ours, TOLERANCE)
    assert ours.inner._last_call[0] == engine


REFUSED = {
    **BAD,
    'chunk': (ValueError, 'multi-step|not supported under', lambda r: r.grad(chunk_size=5)),
    'chunk type': (TypeError, 'chunk_size', lambda r: r.grad(chunk_size='all')),
    'evolve lengths': (ValueError, 'leading length',
                       lambda r: r.learner.etrace_evolve(r.x, r.y[:-1])),
    'evolve option': (TypeError, 'unexpected keyword', lambda r: r.learner.etrace_evolve(
        r.x, outputs=True)),
    'no sequence': (ValueError, 'at least one sequence',
                    lambda r: r.learner.etrace_grad(step_fn=r.loss)),
    'empty': (ValueError, 'empty', lambda r: r.learner.etrace_grad(
        r.x[:0], r.y[:0], step_fn=r.loss)),
    'inputs': ((TypeError, ValueError), '', lambda r: r.learner.etrace_grad(
        r.x[..., :2], r.y, step_fn=r.loss)),
    'loss output': (ValueError, 'loss_output', lambda r: r.grad(loss_output='mean')),
    'no step function': (TypeError, 'step_fn', lambda r: r.learner.etrace_grad(r.x)),
    'an error of the user': (ZeroDivisionError, '', lambda r: r.learner.etrace_grad(
        r.x, step_fn=lambda x: r.learner(x).sum() / (1 // 0))),
}


@pytest.mark.parametrize('rule, vmap', [
    pytest.param('d_rtrl', False, marks=pytest.mark.slow), ('d_rtrl', True),
    pytest.param('es', False, marks=pytest.mark.slow)],
    ids=['d_rtrl-batch', 'd_rtrl-vmap', 'es-batch'])
def test_refused_calls_leave_every_state_and_a_learner_that_works(float64, rule, vmap):
    """All of them, one after the other, after a good call that left a trace."""
    upstream, ours = pair(ALIF, rule, 5, vmap)
    assert_close(*both(upstream, ours, lambda run: run.grad()), TOLERANCE, nonzero=True)
    before = jax.tree.map(np.asarray, ours.states())
    for name, (error, text, call) in REFUSED.items():
        if name == 'window':                    # a setting of the learner, not of the call
            continue
        brainstate.random.seed(3)
        with pytest.raises(error, match=text):
            call(ours)
        jax.tree.map(np.testing.assert_array_equal, before,
                     jax.tree.map(np.asarray, ours.states()))
    assert_close(*both(upstream, ours, lambda run: run.grad()), TOLERANCE, nonzero=True)
    assert_same_states(upstream, ours, TOLERANCE)


@pytest.mark.parametrize('call, vmap', [
    ('grad', True), ('evolve', False),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (('grad', False), ('evolve', True)))])
def test_a_state_of_another_shape_is_refused_before_anything_moves(vmap, call):
    ours = start(traceops.compile, ALIF, 'd_rtrl', 5, vmap)
    value = ours.model.neuron.V.value
    ours.model.neuron.V.value = value[..., :2]
    before = jax.tree.map(np.asarray, ours.states())
    with pytest.raises(ValueError, match='has shape'):
        ours.grad() if call == 'grad' else ours.learner.etrace_evolve(ours.x)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, ours.states()))
    ours.model.neuron.V.value = value
    ours.grad()


def test_uncompiled_learners_are_told_to_compile():
    for learner in (traceops.D_RTRL(ALIF.make()),
                    traceops.ES_D_RTRL(ALIF.make(), decay_or_rank=.9)):
        with pytest.raises(ValueError, match='compile'):
            learner.etrace_evolve(jnp.ones((3, 2, 3)))


@pytest.mark.parametrize('precision', ['highest', 'bf16x3', 'tf32'])
def test_the_precision_reaches_the_weight_gradient(precision):
    """The product whose inner dimension is steps x samples, from the traced call."""
    with traceops.configured(precision=precision, carry_trace=False):
        run = start(traceops.compile, NETS['lif'], 'd_rtrl', 5)
    text = str(brainstate.transform.make_jaxpr(run.grad)()[0])
    asked = re.findall(r'etp_trace_gradient\[(.*?)\]', text, re.S)
    assert asked and all(f'precision={precision}' in one for one in asked)


def test_a_call_adds_no_warning_to_upstreams(monkeypatch):
    """jax's deprecations name no module of ours; what counts is who is on the stack."""
    ours = []

    def show(message, *args, **kwargs):
        frames = [f.filename for f in traceback.extract_stack() if '/site-packages/jax/' not in
                  f.filename and not f.filename.endswith('warnings.py')]
        if '/traceops/' in frames[-2]:                  # -1 is this function
            ours.append(str(message))
    monkeypatch.setattr(warnings, 'showwarning', show)
    warnings.simplefilter('always')
    for rule in ('d_rtrl', 'es'):
        with traceops.configured(window=3):
            run = start(traceops.compile, ALIF, rule, 7)
        run.grad()
        run.learner.etrace_evolve(run.x)
    assert ours == []
