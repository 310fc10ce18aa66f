# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Whole training calls, compiled for GPUs that are not there: kernels, memory, communication."""

import functools

import brainstate
import braintrace
import jax
import pytest
import saiunit as u
from jax.sharding import PartitionSpec as P

import traceops
from tests.gpufree import TARGETS, quick_first
from traceops.benchmarks import loops, programs
from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import data, evolution, of_case, online
from traceops.benchmarks.targets import collectives, compile_for, kernel_calls, mesh_of

T, B, N = 10, 16, 256
STATES = {'lif': 1, 'alif': 2, 'gru': 1}
#: The scan of each rule: one launch a hidden group (the readout of the spiking nets leaks, and is
#: one too), and one a relation.
KERNEL = {'D_RTRL': 'etp_adjoint_window', 'ES_D_RTRL': 'etp_es_trace_window'}
LAUNCHES = {('D_RTRL', 'gru'): 1}


@functools.cache
def call(net, rule, vmap):
    """A training call without a carried trace, as a pure function, and what it is called with."""
    brainstate.environ.set(dt=1. * u.ms)
    training = of_case(Case('one', net, rule, N, None, steps=T, batch=B, vmap=vmap, n_in=64))
    fn = online(training, traceops.compile, carry_trace=False)
    function, states = programs.pure(fn, training.inputs, training.targets)
    return function, jax.eval_shape(lambda *a: a, states, training.inputs, training.targets)


def calls(nets, quick):
    """Every net, rule and mode; those that are not ``quick`` are slow."""
    return pytest.mark.parametrize('net, rule, vmap', [
        pytest.param(net, rule, vmap, id=f'{rule}-{net}-{"vmap" if vmap else "batch"}',
                     marks=[] if (net, rule, vmap) in quick else pytest.mark.slow)
        for net in nets for rule in KERNEL for vmap in (False, True)])


@calls(STATES, quick=[('alif', 'D_RTRL', True), ('lif', 'ES_D_RTRL', False)])
@pytest.mark.parametrize('gpu', ['h100', *(
    pytest.param(gpu, marks=pytest.mark.slow) for gpu in TARGETS if gpu != 'h100')])
def test_one_kernel_and_no_trace(gpu, net, rule, vmap, proof):
    function, given = call(net, rule, vmap)
    compiled = compile_for(gpu, function, *given)
    kernels = kernel_calls(compiled)
    memory = compiled.memory_analysis().temp_size_in_bytes
    gates = 3 if net == 'gru' else 1        # relations, each with a factor of its own
    step = 4 * B * N * (STATES[net] ** 2 + (2 + gates) * STATES[net] + 4 + gates)
    proof(f'{rule} {net}{", vmap" * vmap}', gpu, f'{len(kernels)} kernels, temporary memory '
          f'{memory / 1e6:.1f} MB, the records {T * step / 1e6:.1f} MB')
    products = kernel_calls(compiled, 'etp_trace_gradient')
    assert len(kernel_calls(compiled, KERNEL[rule])) == LAUNCHES.get((rule, net), 2)
    simulations = kernel_calls(compiled, 'etp_simulate_window')
    # of the net and of its readout; weights of the gru are too many for one program
    assert len(simulations) == (2 if net != 'gru' else 0)
    assert len(kernels) == len(kernel_calls(compiled, KERNEL[rule])) + len(products) + len(
        simulations)
    assert products                         # of a readout of ten outputs it is left to XLA
    assert memory < 2 * T * step


#: (net, rule, neurons, steps, lanes, whether a trace is carried): at most so many launches of a
#: training call of 32 samples.
BARS = {('lif', 'ES_D_RTRL', 128, 50, False, True): 45,
        ('two-alif', 'ES_D_RTRL', 128, 50, True, True): 60,
        ('lif', 'D_RTRL', 1024, 50, False, False): 40, ('lif', 'D_RTRL', 1024, 50, False, True): 50,
        ('alif', 'D_RTRL', 1024, 50, False, False): 45,
        ('alif', 'D_RTRL', 1024, 50, False, True): 55,
        ('gru', 'D_RTRL', 128, 50, False, False): 40, ('lstm', 'D_RTRL', 64, 50, False, False): 40,
        ('lif', 'ES_D_RTRL', 2048, 200, False, True): 50}
#: Of the net; and of a readout that leaks.
SIMULATIONS = {'lif': 2, 'alif': 2, 'two-alif': 2, 'gru': 1, 'lstm': 1}
_QUICK = 'gru', 'D_RTRL', 128, 50, False, False


@pytest.mark.parametrize('bar', quick_first(_QUICK, BARS), ids=lambda bar: '-'.join(map(str, bar)))
def test_a_window_is_simulated_in_one_launch(bar, proof):
    """And the whole training call is a few dozen."""
    net, rule, n, steps, vmap, carried = bar
    brainstate.environ.set(dt=1. * u.ms)
    training = of_case(Case('one', net, rule, n, None, steps=steps, vmap=vmap, n_in=256))
    form = {} if carried else {'carry_trace': False}
    compiled = programs.compile_stateful('h100', online(training, traceops.compile, **form),
                                         training.inputs, training.targets)
    found = programs.read(compiled, 'h100')
    simulations = [k.times for k in found.kernels if 'etp_simulate_window' in k.source]
    assert simulations == [1] * SIMULATIONS[net]
    assert found.total.launches <= BARS[bar]
    proof(f'{rule} {net} {n}{", vmap" * vmap}{", carried" * carried}', 'h100',
          f'{found.total.launches} launches, at most {BARS[bar]}')


@calls(('lif', 'alif'), quick=[('alif', 'D_RTRL', False)])
def test_eight_devices_gather_nothing(net, rule, vmap, proof):
    """The batch spread over eight: sums over the batch are sent, nothing else."""
    function, given = call(net, rule, vmap)

    def spec(a):
        return P('b') if a.shape[:1] == (B,) else P(None, 'b') if a.shape[:2] == (T, B) else P()
    compiled = compile_for('h100', function, *given, mesh=mesh_of('h100', b=8),
                           specs=jax.tree.map(spec, given))
    sent = collectives(compiled)
    proof(f'{rule} {net}{", vmap" * vmap}, batch sharded', '8 x h100', str(sent))
    assert set(sent) == {'all-reduce'}
    # the scans, and the product of the recurrent layer
    assert len(kernel_calls(compiled)) == LAUNCHES.get((rule, net), 2) + 1


def a_step(net, compiler, vmap=False, steps=None):
    """One step by hand, or a loop of them that changes the weights at each: programs of it."""
    brainstate.environ.set(dt=1. * u.ms)
    training = of_case(Case('one', net, 'D_RTRL', N, None, steps=steps or 1, batch=B, vmap=vmap,
                            n_in=64))
    learner = compiler(training.model, training.algorithm, training.inputs[0], **training.options)
    weights = training.model.states(brainstate.ParamState)

    def step(x):
        grads = brainstate.transform.grad(lambda: (learner(x) ** 2).sum(), weights)()
        for key, grad in grads.items():
            weights[key].value = jax.tree.map(lambda w, g: w - .01 * g, weights[key].value, grad)

    def run(xs):
        brainstate.transform.for_loop(step, xs) if steps else step(xs[0])
    return programs.compile_stateful('h100', run, training.inputs)


@pytest.mark.parametrize('vmap', [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_step_by_hand_is_lowered_to_the_kernel(vmap, proof):
    """Of two states and more; and the trace is transposed nowhere, as upstream's is."""
    ours, upstream = (a_step('alif', c, vmap) for c in (traceops.compile, braintrace.compile))
    assert len(kernel_calls(ours, 'etp_d_trace_window')) == len(kernel_calls(ours)) == 1
    assert not kernel_calls(upstream)
    memory = [c.memory_analysis().temp_size_in_bytes for c in (ours, upstream)]
    trace = B * (64 + N) * N * 2 * 4
    proof(f'a step by hand, alif{", vmap" * vmap}', 'h100', '1 kernel, temporary memory '
          f'{memory[0] / 1e6:.1f} MB, upstream {memory[1] / 1e6:.1f} MB')
    assert memory[0] < trace / 2


def test_steps_in_a_loop_update_the_trace_in_place(proof):
    ours, upstream = (programs.read(a_step('alif', c, steps=6), 'h100').total
                      for c in (traceops.compile, braintrace.compile))
    trace = B * (64 + N) * N * 2 * 4
    proof('steps by hand in a loop, alif', 'h100', f'{ours.bytes / 6 / trace:.1f} times the trace '
          f'a step, upstream {upstream.bytes / 6 / trace:.1f}')
    # read and written by the update, read by the solve; and a copy before the loop
    assert ours.bytes < 6 * 3.6 * trace < upstream.bytes


#: (rule, neurons): at most so many launches of a training step whose loop is written by hand,
#: optimiser included.
LOOPS = {('ES_D_RTRL', 128): 50, ('D_RTRL', 1024): 50}


@pytest.mark.parametrize('row', quick_first(('ES_D_RTRL', 128), LOOPS), ids=str)
def test_a_loop_written_by_hand_is_simulated_in_one_launch(row, proof):
    rule, n = row
    brainstate.environ.set(dt=1. * u.ms)
    one = Case('one', 'lif', rule, n, None, vmap=True, n_in=256)
    with traceops.enabled():
        program = programs.compile_stateful(
            'h100', loops.train_step(loops.LoopCase('one', one)), *data(one))
    found = programs.read(program, 'h100')
    assert [k.times for k in found.kernels if 'etp_simulate_window' in k.source] == [1, 1]
    assert found.total.launches <= LOOPS[row]
    proof(f'a loop by hand, {rule} lif {n}', 'h100',
          f'{found.total.launches} launches, at most {LOOPS[row]}')


#: Launches, at most, of 50 steps without a loss whose trace is not read, and of as many that a
#: training call follows.
WARM_UPS = {'ES_D_RTRL': (15, 45), 'D_RTRL': (15, 45)}


@pytest.mark.parametrize('rule', quick_first('ES_D_RTRL', WARM_UPS))
def test_steps_without_a_loss_are_simulated_in_one_launch(rule, proof):
    def training():
        brainstate.environ.set(dt=1. * u.ms)
        return of_case(Case('one', 'lif', rule, 128, None, n_in=256))

    def found(make, train):
        return programs.read(programs.compile_stateful(
            'h100', make(train), train.inputs, train.targets), 'h100')

    def warm_up(train):
        learner = traceops.compile(
            train.model, train.algorithm, train.inputs[0], **train.options)

        def call(x, y):
            learner.etrace_evolve(x)
            return learner.etrace_grad(x, step_fn=lambda i: train.loss(learner(i), y))
        return call
    counted = []
    for make, most in zip((evolution, warm_up), WARM_UPS[rule], strict=True):
        one = found(make, training())
        assert {k.times for k in one.kernels if 'etp_simulate_window' in k.source} == {1}
        assert one.total.launches <= most
        counted.append(f'{one.total.launches} launches, at most {most}')
    proof(f'{rule} lif 128, without a loss; and a training call after it', 'h100',
          '; '.join(counted))


def test_a_step_of_one_state_is_upstreams():
    """XLA makes one pass over the trace of its update and its solve."""
    assert not kernel_calls(a_step('lif', traceops.compile))


def test_the_report_of_a_case(proof):
    """``traceops programs`` on a small net: the programs it compares, and what they launch."""
    case = Case('small', 'lif', 'D_RTRL', 64, None, steps=8, batch=4)
    found = programs.programs(functools.partial(of_case, case), 'h100')
    assert set(found) == {'upstream', 'traceops', 'loop', 'reset', 'free', 'alone', 'forward'}
    assert found['alone'].total.launches == 2       # the product of the inputs, and the kernel
    assert found['traceops'].seconds > 0 < found['loop'].seconds
    assert not any(p.total.unknown_loops for p in found.values())
    ours = [k for k in found['free'].kernels if 'etp_adjoint_window' in k.source]
    assert [k.times for k in ours] == [1, 1] and {k.basis for k in ours} == {'bytes'}
    ours = max(ours, key=lambda k: k.read)
    # signal and Jacobian in, one step of the factor, delta and what enters out, all of S = 1
    assert ours.read == 2 * 8 * 4 * 64 * 4 + 4 * 64 * 4
    assert ours.written == 8 * 4 * 64 * 4 + 4 * 64 * 4 + 4         # no filter: one element unused
    trace = 4 * (case.n_in + 64) * 64 * 4
    assert found['free'].total.bytes < 8 * 2 * trace < found['upstream'].total.bytes
    assert found['free'].total.launches < found['forward'].total.launches   # five an iteration
    proof('traceops programs, small LIF', 'h100', ', '.join(
        f'{who} {p.total.launches} launches' for who, p in found.items()))
