# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Every option of etrace_grad and etrace_evolve, and what a call leaves behind."""

import warnings

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity.harness import (
    Run,
    assert_close,
    assert_same_states,
    both,
    compiled,
    jitted,
    pair,
    programs,
    start,
)
from tests.parity.nets import NETS
from traceops import ops
from traceops.errors import TraceNotCarriedError
from traceops.host import plan

TOLERANCE = 1e-10
LIF = NETS['lif']


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def check(upstream, ours, call):
    want, got = both(upstream, ours, call)
    assert ours.inner._last_call[0] == 'window'
    assert_close(want, got, TOLERANCE, nonzero=True)
    assert_same_states(upstream, ours, TOLERANCE)


@pytest.mark.parametrize('options', [
    {'mask': jnp.array([1, 0, 1, 1, 0])}, {'mask': jnp.array([.5, 0, 2., 1, .25])},
    {'reduction': 'sum', 'loss_output': 'masked'}, {'loss_output': 'scalar'},
    {'chunk_size': 1}, {'return_value': False},
], ids=lambda o: '-'.join(o))
def test_options(float64, options):
    check(*pair(LIF, 'd_rtrl', 5, window=3), lambda run: run.grad(**options))


@pytest.mark.parametrize('return_value', [pytest.param(False, marks=pytest.mark.slow), True])
def test_aux_and_pytrees_of_sequences(float64, return_value):
    def call(run: Run):
        def step(data):
            out = run.learner(data['x'])
            return ((out - data['y']) ** 2).mean(), {'out': out, 'first': data['x'][0]}
        return run.learner.etrace_grad({'x': run.x, 'y': run.y}, step_fn=step, has_aux=True,
                                       return_value=return_value)
    check(*pair(LIF, 'es', 7, window=3), call)


def test_weights_renamed_and_in_part(float64):
    def call(run: Run):
        return run.grad(weights={'mine': run.model.linear.weight})
    check(*pair(LIF, 'd_rtrl', 5), call)


def test_a_weight_that_the_loss_reads_itself(float64):
    """L2 on a traced weight, and a parameter outside the learner."""
    def call(run: Run):
        outside = brainstate.ParamState(jnp.arange(2.))
        w = run.learner.param_states if run.learner is run.inner else run.inner.param_states
        readout = run.model.readout.W if hasattr(run.model.readout, 'W') else None

        def step(x, y):
            penalty = sum((leaf ** 2).sum() for leaf in jax.tree.leaves(readout.value))
            return ((run.learner(x) + outside.value - y) ** 2).mean() + 0.1 * penalty
        return run.learner.etrace_grad(run.x, run.y, step_fn=step, return_value=True,
                                       weights={**dict(w.items()), ('outside',): outside})
    check(*pair(LIF, 'd_rtrl', 5, window=2), call)


def test_a_loss_that_ignores_the_output_at_some_steps(float64):
    def call(run: Run):
        def step(x, y):
            return jnp.where(y.sum() > 0, ((run.learner(x) - y) ** 2).mean(), 0.)
        return run.learner.etrace_grad(run.x, run.y, step_fn=step, return_value=True)
    check(*pair(LIF, 'd_rtrl', 7), call)


@pytest.mark.parametrize('rule, vmap', [
    ('d_rtrl', False), ('es', True),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (('eprop', False), ('d_rtrl', True), ('es', False), ('eprop', True)))])
def test_evolve_then_grad_then_a_single_step(float64, rule, vmap):
    if vmap and rule == 'eprop':
        pytest.skip('upstream itself leaks a tracer: its filter is written under vmap')
    upstream, ours = pair(NETS['alif'], rule, 7, vmap, window=3)

    def evolve(run):
        return run.learner.etrace_evolve(run.x, return_outputs=True)
    as_people_do = jitted if vmap or rule != 'd_rtrl' else lambda call: call
    for call in (evolve, Run.eager_grad, lambda run: run.learner(run.x[0])):
        want, got = both(upstream, ours, as_people_do(call))
        assert_close(want, got, TOLERANCE, nonzero=True)
        assert_same_states(upstream, ours, TOLERANCE)


@pytest.mark.parametrize('name, vmap, window', [
    ('alif', True, 3), ('lif', False, 7), ('two-groups', False, 3),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('embedding', False, 3), ('bypass', False, 3), ('elementwise', True, 3),
        ('sparse', True, 3), ('conv', False, 3), ('gru', False, 3)))])
def test_factors_after_steps_without_a_loss(float64, name, vmap, window):
    """Steps in two phases: from zero, from what the call before left, and a gradient after it."""
    upstream, ours = pair(NETS[name], 'es', 7, vmap, window=window, two_phase=True)
    evolve = jitted(lambda run: run.learner.etrace_evolve(run.x, return_outputs=True))
    for call in (evolve, evolve, Run.grad):
        want, got = both(upstream, ours, call)
        assert_close(want, got, TOLERANCE, nonzero=True)
        assert_same_states(upstream, ours, TOLERANCE)
    said = str(traceops.explain(ours.learner))
    assert 'etrace_evolve' in said and 'no trace of the size' not in said


def test_reset_then_again(float64):
    upstream, ours = pair(LIF, 'eprop', 5)
    for _ in range(2):
        want, got = both(upstream, ours, lambda run: run.grad())
        assert_close(want, got, TOLERANCE, nonzero=True)
        for run in (upstream, ours):
            run.inner.reset_state()
    assert_same_states(upstream, ours, TOLERANCE)


def test_a_jitted_call_sees_the_trace_of_the_last(float64):
    """A trace known to be zero while tracing must not be taken for zero ever after."""
    upstream, ours = pair(LIF, 'd_rtrl', 5)
    steps = {id(r): brainstate.transform.jit(r.grad) for r in (upstream, ours)}
    for _ in range(3):
        want, got = both(upstream, ours, lambda run: steps[id(run)]())
        assert_close(want, got, TOLERANCE, nonzero=True)
    assert_same_states(upstream, ours, TOLERANCE)


@pytest.mark.parametrize('how', ['twice', 'scan'])
def test_what_cannot_be_counted_runs_upstream(float64, how):
    def call(run: Run):
        def step(x, y):
            if how == 'twice':
                out = run.learner(x) + run.learner(x)
            else:
                out = brainstate.transform.for_loop(run.learner, jnp.stack([x, x])).sum(0)
            return ((out - y) ** 2).mean()
        return run.learner.etrace_grad(run.x, run.y, step_fn=step, return_value=True)
    upstream, ours = pair(LIF, 'd_rtrl', 5)
    want, got = both(upstream, ours, call)
    assert_close(want, got, TOLERANCE, nonzero=True)
    assert ours.inner._last_call[0] == 'per-step' and 'step_fn calls' in ours.inner._last_call[1]


def test_diagonal_recurrence_equals_bptt(float64):
    """Where every recurrence is diagonal D-RTRL is exact."""
    _, ours = pair(NETS['elementwise'], 'd_rtrl', 12)
    got = ours.grad(reduction='sum')[0]
    brainstate.random.seed(0)
    model = NETS['elementwise'].make()
    brainstate.nn.init_all_states(model, batch_size=ours.x.shape[1])
    weights = model.states(brainstate.ParamState)

    def total():
        return brainstate.transform.for_loop(
            lambda x, y: ((model(x) - y) ** 2).mean(), ours.x, ours.y).sum()
    want = brainstate.transform.grad(total, weights)()
    for path in weights:
        if path[0] != 'out':        # the readout is not a traced parameter of this rule
            assert_close(want[path], got[path], TOLERANCE, nonzero=True)


def test_a_mask_that_is_not_a_number_is_what_it_is_upstream(float64):
    """Everything it touches is none either."""
    want, got = both(*pair(LIF, 'd_rtrl', 5, window=3),
                     lambda run: run.grad(mask=jnp.array([1., jnp.nan, 1., 1., 0.])))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(jnp.isnan, want),
                 jax.tree.map(jnp.isnan, got))
    assert jnp.isnan(jax.tree.leaves(got)[0]).any()


BAD = {
    'lengths': (ValueError, 'leading length',
                lambda r: r.learner.etrace_grad(r.x, r.y[:-1], step_fn=r.loss)),
    'mask shape': (ValueError, 'mask', lambda r: r.grad(mask=jnp.ones(3))),
    'window': (ValueError, 'window=9 is longer than the sequence of 5', lambda r: r.grad()),
    'option': (TypeError, 'unexpected keyword', lambda r: r.grad(windows=3)),
    'reduction': (ValueError, 'reduction', lambda r: r.grad(reduction='median')),
    'loss': (ValueError, 'scalar loss',
             lambda r: r.learner.etrace_grad(r.x, step_fn=lambda x: r.learner(x))),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_leaves_every_state(float64, name):
    error, text, call = BAD[name]
    with traceops.configured(window=9 if name == 'window' else None):
        ours = start(traceops.compile, LIF, 'd_rtrl', 5)
    before = jax.tree.map(np.asarray, ours.states())
    with pytest.raises(error, match=text):
        call(ours)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, ours.states()))


@pytest.mark.cpu('on a GPU there is the backend')
@pytest.mark.parametrize('rule', ['d_rtrl', 'es'])
def test_a_backend_that_is_named_does_not_fall_back(rule):
    """Not even for a convolution, whose weight gradient is no product of ours."""
    with traceops.configured(backend='triton'):
        ours = start(traceops.compile, NETS['conv'], rule, 5)
    before = jax.tree.map(np.asarray, ours.states())
    with pytest.raises(ops.BackendError, match='triton'):
        ours.eager_grad()
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, ours.states()))


def test_a_state_of_another_shape():
    ours = start(traceops.compile, LIF, 'd_rtrl', 5)
    ours.model.neuron.V.value = ours.model.neuron.V.value[:2]
    with pytest.raises(ValueError, match='has shape'):
        ours.grad()


def test_the_derivative_of_a_gradient_is_that_of_what_is_computed(float64):
    """Upstream's is another: it leaves terms out."""
    scale = brainstate.ParamState(jnp.asarray(1.))

    def compute(compiler, at=None):
        run = start(compiler, NETS['vanilla'], 'd_rtrl', 5)
        scale.value = jnp.asarray(1. if at is None else at)

        def norm():
            grads = run.learner.etrace_grad(run.x * scale.value, run.y, step_fn=run.loss)
            return sum(jnp.sum(g ** 2) for g in jax.tree.leaves(grads))
        if at is not None:
            return brainstate.transform.jit(norm)()
        return brainstate.transform.jit(
            lambda: brainstate.transform.grad(norm, scale)())()
    h = 1e-4
    for compiler in (braintrace.compile, traceops.compile):
        change = (compute(compiler, 1. + h) - compute(compiler, 1. - h)) / (2 * h)
        close = np.isclose(compute(compiler), change, rtol=1e-6, atol=0.)
        assert close == (compiler is traceops.compile) and abs(change) > 1e-3


def test_an_uncompiled_learner():
    model = LIF.make()
    learner = traceops.D_RTRL(model)
    with pytest.raises(ValueError, match='compile'):
        learner.etrace_grad(jnp.ones((3, 2, 3)), step_fn=lambda x: learner(x).sum())


class TestWithoutCarrying:
    """``carry_trace=False``: no trace, and a clear word where one is needed."""

    def test_each_call_starts_from_zero(self, float64):
        upstream, ours = pair(NETS['alif'], 'd_rtrl', 5, carry_trace=False)
        for _ in range(2):
            want, got = both(upstream, ours, lambda run: run.grad())
            assert_close(want, got, TOLERANCE, nonzero=True)
            upstream.inner.reset_state()

    @pytest.mark.parametrize('call', [
        lambda r: r.inner.get_etrace_of(r.model.linear.weight),
        lambda r: brainstate.transform.grad(
            lambda: r.learner(r.x[0]).sum(), r.inner.param_states)(),
        lambda r: r.learner(r.x[0]), lambda r: r.learner.etrace_evolve(r.x),
        lambda r: brainstate.transform.for_loop(r.learner, r.x),
    ], ids=['get_etrace_of', 'a single gradient', 'a step', 'evolve', 'loop'])
    def test_what_needs_a_trace_says_so(self, call):
        with traceops.configured(carry_trace=False):
            ours = start(traceops.compile, LIF, 'd_rtrl', 5)
        with pytest.raises(TraceNotCarriedError, match='carry_trace=True'):
            call(ours)
        assert ours.model(ours.x[0]).shape == (4, 2)        # looking forward needs none

    @pytest.mark.parametrize('rule, vmap, two_phase, steps, window', [
        ('d_rtrl', True, False, 7, 3), ('eprop', False, False, 7, 3), ('d_rtrl', False, True, 6, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ('d_rtrl', False, False, 7, 3), ('d_rtrl', True, True, 7, 3),
            ('eprop', False, True, 7, 3), ('d_rtrl', False, False, 6, 2)))])
    def test_windows_are_taken_from_the_last(self, float64, rule, vmap, two_phase, steps, window):
        """A last window that is shorter, and one that is not: no trace between, same gradient."""
        upstream, ours = pair(NETS['alif'], rule, steps, vmap, window=window,
                              carry_trace=False, two_phase=two_phase)
        want, got = both(upstream, ours, lambda run: run.grad())
        assert_close(want, got, 1e-10, nonzero=True)
        assert_close(upstream.states()['model'], ours.states()['model'], 1e-10)
        assert ours.inner.running_index.value == steps
        assert not ours.inner.etrace_bwg

    def test_no_array_of_batch_inputs_outputs(self):
        """From the compiled program: 4 x 9 x 6 elements appear only where a trace is carried."""
        def shapes(**settings):
            with traceops.configured(**settings):
                run = start(traceops.compile, LIF, 'd_rtrl', 5)
            text = compiled(run.grad).as_text()
            return '[4,9,6' in text or '[4,54' in text
        assert shapes(carry_trace=True) and not shapes(carry_trace=False)


@pytest.mark.parametrize('rule', ['d_rtrl', pytest.param('es', marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_sequence(rule):
    """Temporary memory of the compiled call, beyond the sequences and what is returned."""
    def temporary(steps):
        with traceops.configured(window=50):
            run = start(traceops.compile, LIF, rule, 100)
        x = jax.ShapeDtypeStruct((steps, *run.x.shape[1:]), run.x.dtype)
        program = compiled(lambda x: run.learner.etrace_grad(
            x, step_fn=lambda i: run.learner(i).sum() ** 2), x)
        return program.memory_analysis().temp_size_in_bytes
    short, long = temporary(100), temporary(10_000)
    per_step = 4 * 4 * 3        # at most a copy of the inputs
    assert long - short <= 2 * per_step * 9_900 + 2 ** 16


@pytest.mark.usefixtures('compiled_quickly')
@pytest.mark.cpu('a short sequence takes the window on a GPU')
class TestWhereUpstreamIsAsFast:
    """Few steps of a small net on a CPU: upstream's step, and it says so."""

    @pytest.mark.parametrize('net, rule, steps', [
        ('lif', 'es', 7), ('alif', 'es', 3), ('lif', 'd_rtrl', 2), ('gru', 'd_rtrl', 3)])
    def test_a_short_sequence_takes_upstreams_way(self, float64, net, rule, steps):
        upstream, ours = (start(compiler, NETS[net], rule, steps)
                          for compiler in (braintrace.compile, traceops.compile))
        grad = programs(upstream, ours)
        for _ in range(2):
            want, got = both(upstream, ours, grad)
            assert_close(want, got, 0., nonzero=True)
        row = traceops.explain(ours.learner).rows[0]
        assert row.engine == 'per-step' and f'a sequence of {steps} steps' in row.reason

    @pytest.mark.parametrize('most, times, per_step', [
        (240, 5, True), (241, 5, False), (240, 1, False)])
    def test_of_a_narrow_trace_beside_a_large_record(self, most, times, per_step, monkeypatch):
        """However many steps; 4 samples of 15 numbers, and 24 of trace."""
        monkeypatch.setattr(plan, 'LARGE_RECORD', most)
        monkeypatch.setattr(plan, 'NARROW', times)
        upstream, ours = (start(compiler, NETS['elementwise'], 'd_rtrl', 7)
                          for compiler in (braintrace.compile, traceops.compile))
        want, got = both(upstream, ours, lambda run: run.grad())
        assert_close(want, got, 0. if per_step else 1e-5, nonzero=True)
        row = traceops.explain(ours.learner).rows[0]
        assert row.engine == ('per-step' if per_step else 'window')
        assert ("KiB to record: upstream's step is as fast" in row.reason) == per_step

    @pytest.mark.parametrize('steps', [2, pytest.param(3, marks=pytest.mark.slow)])
    def test_of_a_larger_trace_every_step_counts(self, steps, monkeypatch):
        monkeypatch.setattr(plan, 'SMALL_TRACE', {2: 64, 3: 64})
        ours = start(traceops.compile, LIF, 'd_rtrl', steps)
        ours.grad()
        assert {r.engine for r in traceops.explain(ours.learner).rows} == {'window'}

    @pytest.mark.parametrize('steps, reason', [(1, 'a sequence of 1 steps'), (2, '')])
    def test_of_a_larger_net_only_one_step(self, steps, reason, monkeypatch):
        monkeypatch.setattr(plan, 'SMALL', 4)
        ours = start(traceops.compile, LIF, 'es', steps)
        ours.grad()
        row = traceops.explain(ours.learner).rows[0]
        assert row.engine == ('per-step' if reason else 'window') and reason in row.reason

    @pytest.mark.parametrize('settings, steps, vmap, net, rule', [
        ({'window': 3}, 7, False, 'lif', 'es'), ({}, 7, True, 'lif', 'es'),
        ({}, 8, False, 'lif', 'es'), ({}, 4, False, 'alif', 'es'),
        ({'two_phase': True}, 2, False, 'lif', 'd_rtrl'), ({}, 4, False, 'lif', 'd_rtrl'),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ({'two_phase': True}, 7, False, 'lif', 'es'),
            ({'window': 2}, 2, False, 'lif', 'd_rtrl'), ({}, 2, True, 'lif', 'd_rtrl'),
            ({'carry_trace': False}, 2, False, 'lif', 'd_rtrl'),
            ({}, 2, False, 'alif', 'd_rtrl')))])
    def test_not_where_the_window_is_asked_for_or_faster(self, settings, steps, vmap, net, rule):
        with traceops.configured(**settings):
            ours = start(traceops.compile, NETS[net], rule, steps, vmap)
        ours.grad()
        assert {r.engine for r in traceops.explain(ours.learner).rows} == {'window'}
