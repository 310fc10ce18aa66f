# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Whole training calls, compiled for GPUs that are not there: kernels, memory, communication."""

import functools

import brainstate
import jax
import pytest
import saiunit as u
from jax.sharding import PartitionSpec as P

import traceops
from traceops.benchmarks import programs
from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import of_case, online
from traceops.benchmarks.targets import GPUS, collectives, compile_for, kernel_calls, mesh_of

T, B, N = 10, 16, 256
STATES = {'lif': 1, 'alif': 2, 'gru': 1}
#: The scan of each rule: one launch a hidden group (the readout of the spiking nets leaks, and is
#: one too), and one a relation.
KERNEL = {'D_RTRL': 'etp_adjoint_window', 'ES_D_RTRL': 'etp_es_trace_window'}
LAUNCHES = {('D_RTRL', 'gru'): 1}
FORM = {k: v for k, v in {'two_phase': True}.items() if k in traceops.config.ENVIRONMENT}


@functools.cache
def call(net, rule, vmap):
    """A training call without a carried trace, as a pure function, and what it is called with."""
    brainstate.environ.set(dt=1. * u.ms)
    training = of_case(Case('one', net, rule, N, None, steps=T, batch=B, vmap=vmap, n_in=64))
    fn = online(training, traceops.compile, carry_trace=False, **FORM)
    function, states = programs.pure(fn, training.inputs, training.targets)
    return function, jax.eval_shape(lambda *a: a, states, training.inputs, training.targets)


CALLS = [pytest.param(net, rule, vmap, id=f'{rule}-{net}-{"vmap" if vmap else "batch"}')
         for net in STATES for rule in KERNEL for vmap in (False, True)]


@pytest.mark.parametrize('net, rule, vmap', CALLS)
@pytest.mark.parametrize('gpu', ['h100', *(
    pytest.param(gpu, marks=pytest.mark.slow) for gpu in GPUS if gpu != 'h100')])
def test_one_kernel_and_no_trace(gpu, net, rule, vmap, proof):
    function, given = call(net, rule, vmap)
    compiled = compile_for(gpu, function, *given)
    kernels = kernel_calls(compiled)
    memory = compiled.memory_analysis().temp_size_in_bytes
    gates = 3 if net == 'gru' else 1        # relations, each with a factor of its own
    step = 4 * B * N * (STATES[net] ** 2 + (2 + gates) * STATES[net] + 4 + gates)
    proof(f'{rule} {net}{", vmap" * vmap}', gpu, f'{len(kernels)} kernels, temporary memory '
          f'{memory / 1e6:.1f} MB, the records {T * step / 1e6:.1f} MB')
    assert len(kernel_calls(compiled, KERNEL[rule])) == len(kernels) == LAUNCHES.get((rule, net), 2)
    assert memory < 2 * T * step


@pytest.mark.parametrize('net, rule, vmap', [c for c in CALLS if 'lif' in c.values[0]])
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
    assert len(kernel_calls(compiled)) == LAUNCHES.get((rule, net), 2)


def test_the_report_of_a_case(proof):
    """``traceops programs`` on a small net: the programs it compares, and what they launch."""
    case = Case('small', 'lif', 'D_RTRL', 64, None, steps=8, batch=4)
    found = programs.programs(functools.partial(of_case, case), 'h100')
    assert set(found) == {'upstream', 'traceops', 'free', 'forward'}
    assert not any(p.total.unknown_loops for p in found.values())
    ours = [k for k in found['free'].kernels if 'etp_adjoint_window' in k.source]
    assert [k.times for k in ours] == [1, 1] and {k.basis for k in ours} == {'bytes'}
    ours = max(ours, key=lambda k: k.read)
    # signal, Jacobian and factor in, delta and what enters out, all of S = 1
    assert ours.read == 3 * 8 * 4 * 64 * 4
    assert ours.written == 8 * 4 * 64 * 4 + 4 * 64 * 4 + 4         # no filter: one element unused
    trace = 4 * (case.n_in + 64) * 64 * 4
    assert found['free'].total.bytes < 8 * 2 * trace < found['upstream'].total.bytes
    proof('traceops programs, small LIF', 'h100', ', '.join(
        f'{who} {p.total.launches} launches' for who, p in found.items()))
