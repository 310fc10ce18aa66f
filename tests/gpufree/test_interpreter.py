# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Every kernel in Triton's interpreter: the suites of the reference, through the primitive.

The interpreter runs a kernel on arrays whose surroundings are guarded and whose outputs are NaN
before it starts.
"""

import dataclasses
import importlib
import itertools
import warnings

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
import pytest
import saiunit as u

import traceops
from tests.gpufree import slow
from tests.ops import oracle, suites
from tests.ops.steps import operands_of
from traceops import cli, ops
from traceops.benchmarks import repeats, tune
from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import jitted, of_case, online
from traceops.benchmarks.nets import make
from traceops.kernels.d_trace_window import launch as d_launch
from traceops.kernels.simulate_window import launch, text
from traceops.kernels.trace_gradient import launch as product_launch
from traceops.ops import choice, interpreter, measured, verify
from traceops.ops.primitive import OPERATIONS
from traceops.ops.simulate_window import SIMULATE_WINDOW

#: What jax does around a kernel, and the gradients, which are the reference's: d_trace_window has
#: them quickly.
_AROUND = 'control_flow_and_remat', 'gradient', 'nested_vmap', 'vmap_of_inner_axes'


@slow(*_AROUND)
class TestAdjointWindow(suites.AdjointWindowSuite):
    backend = 'triton'


@pytest.mark.slow
class TestAdjointWindowFiltered(suites.AdjointWindowSuite):
    backend, kappa = 'triton', 0.6
    test_matches_a_loop = test_any_axes_of_positions = test_one_step_and_no_step = None
    test_an_empty_batch = test_states_may_be_separate = None


@slow(*_AROUND)
class TestLeavingWindow(suites.LeavingWindowSuite):
    backend = 'triton'


@pytest.mark.slow
class TestLeavingWindowFiltered(suites.LeavingWindowSuite):
    backend, kappa = 'triton', 0.6
    test_matches_a_loop = test_one_step_and_an_empty_batch = test_a_trace_made_of_it = None
    test_more_steps_than_a_kernel_loads_ahead = None


@slow(*_AROUND)
class TestEsTraceWindow(suites.EsTraceWindowSuite):
    backend = 'triton'


class TestDTraceWindow(suites.DTraceWindowSuite):
    backend = 'triton'

    @pytest.mark.parametrize('B, programs', [(5, 1), (5, 2), (7, 4)])
    @pytest.mark.parametrize('gradient', ['entering', 'leaving', 'none'])
    def test_a_program_walks_several_samples(self, B, programs, gradient, monkeypatch):
        """On a device that is busy with few tiles; here the table has to be told."""
        monkeypatch.setattr(d_launch, '_ENOUGH', programs)
        jax.clear_caches()
        operands = self.operands(2, B=B, I=17, O=21)
        got = ops.d_trace_window(*operands, gradient=gradient, backend='triton')
        jax.clear_caches()
        want = oracle.d_trace_window(*operands, gradient)
        suites.close(got[0], want[0], self.tolerance)
        if gradient != 'none':
            suites.close(got[1], want[1], self.tolerance)

    @pytest.mark.parametrize('I, O', [(1, 1000), (1000, 3), (63, 60)])
    def test_odd_sizes(self, I, O):  # noqa: E741
        operands = self.operands(3, T=2, B=1, I=I, O=O)
        suites.close(self.run(*operands), oracle.d_trace_window(*operands), self.tolerance)

    @pytest.mark.parametrize('storage, tolerance', [(jnp.bfloat16, 9e-3), (jnp.float16, 1e-3)])
    def test_narrow_update(self, storage, tolerance):
        """One step after another, each rounded once (the interpreter rounds towards zero)."""
        e, x, f, D, L = self.operands(2, T=1, storage=storage)
        got = jax.vmap(lambda *a: ops.d_trace_update(*a, backend='triton'))(
            *[jnp.stack([a, a]) for a in (e, x[0], f[0], D, L)])
        want = oracle.d_trace_window(e, x, f, D, L, 'leaving')
        suites.close(got[0][1], want[0], tolerance)
        suites.close(got[1][1], want[1], tolerance)


@slow(*_AROUND)
class TestTraceGradient(suites.TraceGradientSuite):
    backend = 'triton'

    @pytest.mark.parametrize('T, B, I, O', [(2, 1, 1000, 3), (3, 5, 63, 1000), (60, 3, 1, 60)])
    def test_odd_sizes(self, T, B, I, O):  # noqa: E741
        operands = self.operands(T=T, B=B, I=I, O=O)
        suites.close(self.run(*operands), oracle.trace_gradient(*operands), self.tolerance)

    @pytest.mark.parametrize('parts', [1, 2, 7])
    @pytest.mark.parametrize('total', [False, True])
    def test_rows_are_shared_out(self, parts, total, monkeypatch):
        """As for few tiles; here the table has to be told."""
        monkeypatch.setattr(product_launch, '_ENOUGH', parts)
        monkeypatch.setattr(product_launch, '_FEWEST', parts + 1)
        monkeypatch.setattr(product_launch, '_ROWS', 30)
        jax.clear_caches()
        operands = self.operands(T=30, B=7, I=20, O=30)[:2 + total]
        call = OPERATIONS['trace_gradient'].kernel(*operands, capability=90, precision='highest',
                                                   by_sample=False)
        assert call.grid[1] == parts and bool(call.aliases) == (total and parts == 1)
        got = self.run(*operands)
        jax.clear_caches()
        suites.close(got, oracle.trace_gradient(*operands), self.tolerance)

    @pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize('precision', ops.PRECISIONS)
    def test_what_is_no_number_stays_none(self, bad, precision):
        """Whatever its bits: those of a device's own NaN are all ones."""
        x, delta, total = self.operands()
        value = np.int32(0x7fffffff).view(np.float32) if np.isnan(bad) else np.float32(bad)
        got = np.asarray(ops.trace_gradient(
            x, delta.at[1, 2, 3].set(value), total, precision=precision, backend=self.backend))
        finite = np.isfinite(got)
        assert not finite[:, 3].any() and finite[:, :3].all() and finite[:, 4:].all()

    def test_small_and_large_values(self):
        """Terms have the exponents of float32: nothing is lost that a product could show."""
        x, delta, _ = self.operands()
        for scale in (1e-30, 1e30):
            got = self.run(x * np.float32(scale), delta)
            suites.close(np.asarray(got, float) / np.float32(scale),
                         oracle.trace_gradient(x, delta), self.tolerance)


@slow(*_AROUND)
class TestTraceGradientBySample(suites.TraceGradientBySampleSuite):
    backend = 'triton'


@slow('gradient')
class TestSimulateWindow(suites.SimulateWindowSuite):
    backend = 'triton'

    def test_a_weight_that_is_infinite_is_met_when_its_neuron_fires(self):
        """Where it does not, the loop has a NaN (zero times infinity) and a list of events none."""
        step, (W, *others), slices, states = operands_of('lif', rate='none')
        W = W.at[12 + 3, 5].set(np.inf)
        _, kept = self.run(step, [W, *others], slices, states)
        assert np.isfinite(np.asarray(kept[0])).all()
        fires = [a.at[:, 3].set(9.) for a in states]
        _, kept = self.run(step, [W, others[0], others[1].at[3].set(8.)], slices, fires)
        bad = ~np.isfinite(np.asarray(kept[0]))
        assert bad[:, :, 5].all() and not np.delete(bad, 5, 2).any()


@pytest.mark.parametrize('name, wrong', [
    ('alif', True), ('refractory', True), ('gru', False),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('alif', False), ('refractory', False), ('gru', True)))])
def test_each_text_is_tried_before_it_is_used(name, wrong, monkeypatch, proof):
    """And one that is wrong is seen."""
    verify.forget()
    simulation = ops.Simulation(*operands_of(name, N=33))
    if wrong:
        source = launch.kernel_of(simulation.step)[1].source
        broken = source.replace('0.0625 *', '0.0626 *').replace('0.125 *', '0.126 *').replace(
            '1.0 - v', '1.001 - v')
        assert broken != source
        monkeypatch.setitem(text.TEXTS, launch.name(simulation.step), broken)
        kernels = importlib.import_module('traceops.kernels.simulate_window.triton')
        monkeypatch.setattr(kernels, '_functions', {})
    here = choice.current_place()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter('always')
        found = choice.decide(SIMULATE_WINDOW, simulation.operands, {'step': simulation.step},
                              'auto', here)
    verify.forget()
    if wrong:
        assert found.backend == 'jax' and 'differs from the reference' in found.reason
    else:
        assert found.backend == 'triton' and 'checked on this device' in found.reason
        proof(f'a step of {name}', 'interpreter', found.reason)


@pytest.mark.parametrize('precision', ops.PRECISIONS)
def test_the_errors_of_the_products(precision, proof):
    """Terms as tensor cores get them: the errors that are stated, and no better.

    (Sums of the interpreter round to nearest; what tensor cores add to them is not seen here.)
    """
    delta = suites.draw(1, 20, 32, 96)
    found = []
    for x, (least, most) in zip((suites.spikes(0, 20, 32, 64), suites.draw(2, 20, 32, 64)),
                                ERRORS[precision], strict=True):
        got = np.asarray(ops.trace_gradient(x, delta, precision=precision, backend='triton'), float)
        want = oracle.trace_gradient(x, delta)
        found.append(np.linalg.norm(got - want) / np.linalg.norm(want))
        assert least <= found[-1] <= most
    proof(f'trace_gradient {precision}', 'interpreter',
          f'spikes {found[0]:.1e}, Gaussian {found[1]:.1e}')


#: At least and at most, by norm, for spikes and for Gaussian inputs.
ERRORS = {'highest': ((1e-8, 2e-7), (1e-8, 3e-7)), 'bf16x3': ((1e-8, 2e-7), (1e-3, 4e-3)),
          'bf16x2': ((1e-7, 1e-5), (1e-3, 4e-3)), 'tf32': ((1e-4, 4e-4), (1e-4, 4e-4))}


@pytest.mark.parametrize('name', OPERATIONS)
def test_the_automatic_choice_checks_the_kernel_and_uses_it(name, proof):
    verify.forget()
    operation = OPERATIONS[name]
    operands, params = operation.cases()[0]
    found = choice.decide(operation, operands, params, 'auto', choice.current_place())
    assert found.backend == 'triton' and 'checked on this device' in found.reason
    proof(name, 'interpreter', found.reason)


def _call(name, **changes):
    operands, params = OPERATIONS[name].cases()[0]
    call = OPERATIONS[name].kernel(*operands, capability=90, **params)
    return dataclasses.replace(call, constants={**call.constants, **changes}), list(operands)


def test_a_write_outside_is_seen():
    """A kernel that believes in more positions than there are."""
    call, operands = _call('adjoint_window')
    interpreter.launch(call, operands)
    wrong, _ = _call('adjoint_window', N=call.constants['N'] - 1)
    assert np.isnan(interpreter.launch(wrong, operands)[0]).any()       # some were not written
    wrong, _ = _call('adjoint_window', N=call.constants['N'] + 5)
    with pytest.raises(RuntimeError, match='wrote outside of its outputs'):
        interpreter.launch(dataclasses.replace(wrong, grid=(8,)), operands)
    call, operands = _call('d_trace_window')
    wrong, _ = _call('d_trace_window', I=call.constants['I'] + 1)
    with pytest.raises(RuntimeError, match='wrote outside of its outputs'):
        interpreter.launch(wrong, operands)


def test_a_program_holds_one_call_a_launch():
    """vmap of vmap, compiled: one callback, and no loop around it."""
    many = [jnp.stack([jnp.stack([a, a])] * 3) for a in suites.AdjointWindowSuite().operands(R=1)]
    run = lambda L, D, f: ops.adjoint_window(L, D, [f], backend='triton')  # noqa: E731
    text = jax.jit(jax.vmap(jax.vmap(run))).lower(*many).compile().as_text()
    assert text.count('custom_call_target="xla_ffi_python_cpu_callback"') == 1
    assert ' while(' not in text


@pytest.mark.parametrize('net, rule, vmap, settings', [
    ('lif', 'ES_D_RTRL', False, {'window': 5}),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        ('alif', 'D_RTRL', True, {'window': 5}), ('two-alif', 'ES_D_RTRL', True, {}),
        ('lstm', 'D_RTRL', False, {'carry_trace': False})))])
def test_a_training_call_by_kernels_alone(net, rule, vmap, settings, proof):
    """What the simulation keeps is what the rest is recomputed from; windows follow each other."""
    brainstate.environ.set(dt=1. * u.ms)
    given = Case('one', net, rule, 16, None, steps=12, batch=2, vmap=vmap, n_in=12)
    found = []
    for compiler, more in ((braintrace.compile, {}), (traceops.compile, settings)):
        training = of_case(given)
        found.append(jitted(online(training, compiler, backend='triton', **more))(
            training.inputs, training.targets))
    (want, loss), (got, ours) = found
    scale = [np.linalg.norm(a) for a in jax.tree.leaves(want)]
    worst = max(np.linalg.norm(np.subtract(a, b)) / s for a, b, s in zip(
        jax.tree.leaves(want), jax.tree.leaves(got), scale, strict=True))
    assert min(scale) > 0. and worst < 1e-5 and abs(loss - ours) < 1e-5
    proof(f'a training call, {rule} {net}{", vmap" * vmap}', 'interpreter',
          f'difference {worst:.1e}')


@pytest.mark.parametrize('name', [
    'adjoint_window S=1', 'es_trace_window S=2', 'd_trace_window S=1', 'trace_gradient bf16x3',
    'simulate_window events', pytest.param('', id='all', marks=pytest.mark.slow)])
def test_every_run_has_the_same_bits(name, proof):
    found = [repeats.same_every_time(*one, runs=3) for one in repeats.calls(T=3, B=2, N=16)
             if one[0].startswith(name)]
    assert found and all(one.passed and one.said == '3 runs, the same bits' for one in found)
    for one in found:
        proof(one.name, 'interpreter', one.said)


def test_runs_that_differ_are_seen():
    """By one bit; NaN is itself."""
    count = itertools.count()

    def call(x):
        return jax.pure_callback(lambda a: np.where(np.arange(3) == 1, np.nan, np.nextafter(
            a, a + (next(count) % 2), dtype=np.float32)), x, x)
    found = repeats.same_every_time('one', call, [jnp.ones(3)], runs=4)
    assert not found.passed and found.said == '4 runs, 2 differ from the first'


@pytest.mark.parametrize('kind', ['events', pytest.param('all rows', marks=pytest.mark.slow)])
def test_the_kernel_agrees_with_the_loop_away_from_thresholds(kind, proof):
    simulation, = tune.standard(6, {kind: ((20,), (3,))})
    found = repeats.against_the_loop(f'simulate_window {kind}', simulation)
    assert found.passed and 'difference' in found.said
    proof(found.name, 'interpreter', found.said)


def test_a_threshold_that_is_close_is_not_compared(monkeypatch):
    monkeypatch.setattr(repeats, '_MARGIN', 10.)
    monkeypatch.setattr(repeats, '_SEEDS', 2)
    simulation, = tune.standard(2, {'events': ((20,), (3,))})
    found = repeats.against_the_loop('simulate_window events', simulation)
    assert not found.passed and 'of 2 seeds each has a neuron within' in found.said


class TestTune:
    """The command whole, but for the clock: kernels are checked, run, and their verdict is used."""

    @pytest.fixture(autouse=True)
    def clock(self, tmp_path, monkeypatch):
        monkeypatch.setattr(platformdirs, 'user_cache_path', lambda name: tmp_path / name)
        monkeypatch.setattr(tune.jax, 'default_backend', lambda: 'gpu')
        monkeypatch.setattr(tune.choice, 'cuda_place', choice.current_place)
        measured.forget()
        verify.forget()
        self.results, self.times = [], itertools.cycle((20., 100.))

        def microseconds(fn, args, repeats):
            self.results.append([np.asarray(a) for a in fn(*args)])
            return next(self.times)
        monkeypatch.setattr(tune, 'microseconds', microseconds)
        yield
        measured.forget()
        verify.forget()

    def test_of_sizes(self, monkeypatch, capsys, proof):
        monkeypatch.setattr(tune, 'SIZES', {'events': ((16,), (2,)), 'all rows': ((16,), (2,))})
        assert cli.main(['tune', '--steps', '4']) == 0
        kernel, loop = self.results[0], self.results[1]         # both were run, of one net
        for a, b in zip(kernel, loop, strict=True):
            assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b) > 0.
        assert 'checked on this device' in ' '.join(capsys.readouterr().out.split())
        assert {*measured.known('interpreter')} == {
            'events, 16 neurons, 2 samples', 'all rows, 16 neurons, 2 samples'}
        # a layer of that size, of another step
        step, constants, slices, states = operands_of('lif', N=16, batch=(2,))
        simulation = ops.Simulation(step, constants, slices, states)
        told = 'measured here: 20 us against 100 us'
        assert str(simulation).endswith(f'; {told})')
        assert ops.why('simulate_window', *simulation.operands, step=simulation.step).reason == (
            f'kernel, {told}')
        proof('traceops tune', 'interpreter', told)

    @pytest.mark.slow
    def test_of_a_learner_whose_loop_is_faster(self, tmp_path, monkeypatch):
        self.times = itertools.cycle((100., 20.))
        monkeypatch.setattr(tune, 'factory', lambda target, parser: a_learner)
        assert cli.main(['tune', 'theirs:learner', '--steps', '4']) == 0
        learner = a_learner()
        jitted(lambda x: learner.etrace_grad(x, step_fn=lambda i: (learner(i) ** 2).mean()))(
            jnp.ones((4, 2, 12)))
        assert 'the loop: measured here: 100 us against 20 us' in str(traceops.explain(learner))


def a_learner():
    brainstate.environ.set(dt=1. * u.ms)
    with traceops.configured(two_phase=True):
        return traceops.compile(make('lif', 12, 16, 3), 'ES_D_RTRL', jnp.zeros((2, 12)),
                                batch_size=2, decay_or_rank=.9)
