# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: the call, the block, the settings, the platform; and it can be asked why."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import traceops
from tests.ops.suites import AdjointWindowSuite
from traceops import ops
from traceops.ops import choice, traps, verify
from traceops.ops.primitive import OPERATIONS

ADJOINT = OPERATIONS['adjoint_window']
PARAMS = {'kappa': None, 'states': 0, 'leaving': ''}
GPU = choice.Place('cuda', 90, 'NVIDIA H100', present=False)


@pytest.fixture
def operands():
    return AdjointWindowSuite().operands(R=1)


def call(signal, jacobian, factor, **options):
    return ops.adjoint_window(signal, jacobian, [factor], **options)


def request_of(fn, operands):
    # a function of its own each time: jax traces one no more than once
    return jax.make_jaxpr(lambda *a: fn(*a))(*operands).jaxpr.eqns[-1].params['request']


def test_call_then_block_then_settings(operands):
    assert request_of(call, operands) == 'auto'
    traceops.configure(backend='jax')
    assert request_of(call, operands) == 'jax'
    with traceops.configured(backend='triton'):
        assert request_of(call, operands) == 'triton'
        assert request_of(lambda *a: call(*a, backend='auto'), operands) == 'auto'
    assert request_of(call, operands) == 'jax'


def test_a_compiled_function_keeps_the_choice_it_was_traced_with(operands):
    """No setting is in the key of jax's caches, which is that of everybody else's programs too."""
    seen = []

    @jax.jit
    def function(*a):
        seen.append(choice.requested())
        return call(*a)
    function(*operands)
    with traceops.configured(backend='jax'):
        function(*operands)
        assert request_of(call, operands) == 'jax'
    traceops.configure(backend='jax')
    function(*operands)
    traceops.reset()
    function(*operands)
    assert seen == ['auto']


def test_a_named_backend_works_or_raises(operands):
    want = r"backend='triton' was asked for, but kernels run on NVIDIA GPUs.*'jax'.*backend='auto'"
    with pytest.raises(ops.BackendError, match=want):
        call(*operands, backend='triton')
    with pytest.raises(ops.BackendError, match=want):
        jax.jit(jax.vmap(lambda *a: call(*a, backend='triton')))(*[a[None] for a in operands])
    with pytest.raises(ValueError, match="there are 'auto', 'jax', 'triton'"):
        call(*operands, backend='cuda')


@pytest.mark.parametrize('change, reason', [
    (dict(S=5), '5 states a position do not fit in registers'),
    (dict(dtype=jnp.float16), 'computes in float32, the operands are float16'),
    (dict(R=5), 'serves 1 to 4 relations a group, here 5'),
    (dict(place=(0, 9)), 'an operand is empty'),
])
def test_what_a_kernel_does_not_serve_has_a_reason(change, reason, monkeypatch):
    monkeypatch.setattr(traps, 'problem', lambda capability: None)
    operands = AdjointWindowSuite().operands(**{'R': 1, **change})
    found = choice.decide(ADJOINT, operands, PARAMS, 'auto', GPU)
    assert found.backend == 'jax' and reason in found.reason


def test_on_a_gpu_the_kernel_is_chosen(monkeypatch, operands):
    monkeypatch.setattr(traps, 'problem', lambda capability: None)
    found = choice.decide(ADJOINT, operands, PARAMS, 'auto', GPU)
    assert found == ops.Decision('triton', 'kernel, not checked: no such device in this machine')
    monkeypatch.setattr(traps, 'problem', lambda capability: 'the toolchain is too old')
    found = choice.decide(ADJOINT, operands, PARAMS, 'auto', GPU)
    assert found == ops.Decision('jax', 'the toolchain is too old')
    with pytest.raises(ops.BackendError, match='the toolchain is too old'):
        choice.decide(ADJOINT, operands, PARAMS, 'triton', GPU)


def test_a_kernel_that_failed_its_check_is_not_used(monkeypatch, operands):
    here = choice.Place('cuda', 90, 'a GPU')
    monkeypatch.setattr(traps, 'problem', lambda capability: None)
    monkeypatch.setattr(choice, '_warned', set())
    verify.remember(ADJOINT, here, verify.Verdict(False, 'it differs by 1'))
    try:
        with pytest.warns(ops.BackendWarning, match='does not use its kernel adjoint_window.*'
                                                    'it differs by 1.*report') as seen:
            for _ in range(3):
                found = choice.decide(ADJOINT, operands, PARAMS, 'auto', here)
        assert len(seen) == 1 and found.backend == 'jax' and 'it differs by 1' in found.reason
        row = next(r for r in ops.report().rows if r.name == 'adjoint_window')
        assert 'a GPU: FAILED, it differs by 1' in row.check
        named = choice.decide(ADJOINT, operands, PARAMS, 'triton', here)
        assert named.backend == 'triton'
    finally:
        verify.forget()


def test_the_check_can_be_switched_off(monkeypatch):
    monkeypatch.setenv('TRACEOPS_CHECK_KERNELS', '0')
    found = verify.verdict(ADJOINT, choice.Place('cuda', 90, 'a GPU'))
    assert found.passed is None and 'TRACEOPS_CHECK_KERNELS=0' in found.detail
    assert not verify.verdicts()


def test_it_can_be_asked_why(operands):
    found = ops.why('adjoint_window', *operands, kappa=None, states=0, leaving='')
    assert found.backend == 'jax' and 'this program is for cpu' in found.reason
    assert ops.why('d_trace_window').backend == 'jax'
    with pytest.raises(ValueError, match="no operation 'adjoint'; there are 'adjoint_window'"):
        ops.why('adjoint')


def test_the_report():
    found = ops.report()
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {'adjoint_window', 'es_trace_window', 'd_trace_window', 'trace_gradient',
                         'simulate_window', 'sparse_trace_gradient'}
    assert {row.backend for row in rows.values()} == {'jax'}
    assert rows['adjoint_window'].on_gpu == 'triton'
    assert rows['trace_gradient'].on_gpu == 'triton'
    assert 'adjoint_window' in str(found) and found.to_dict()['rows'][0]['primitive']


@pytest.mark.parametrize('T, I, O, precision, by_sample, capability, reason', [
    (50, 2048, 2048, 'tf32', False, 90, 'product of one term'),
    (50, 8, 2048, 'highest', False, 90, 'fewer than 16'),
    (50, 2048, 8, 'bf16x3', False, 90, 'fewer than 16'),
    (50, 128, 128, 'highest', False, 90, 'few tiles'),
    (50, 2048, 2048, 'highest', False, 90, None), (4, 128, 128, 'bf16x3', False, 80, None),
    (50, 2048, 2048, 'bf16x3', False, 90, 'faster on this generation'),
    (50, 2048, 2048, 'highest', True, 90, 'faster on this generation'),
    (50, 2048, 2048, 'highest', True, 80, None)])
def test_a_product_that_xla_does_as_well_is_left_to_it(T, I, O, precision, by_sample,  # noqa: E741
                                                       capability, reason):
    given = [jax.ShapeDtypeStruct((T, 32, n), jnp.float32) for n in (I, O)]
    left_to_xla('trace_gradient', given, {'precision': precision, 'by_sample': by_sample},
                capability, reason)


@pytest.mark.parametrize('T, reason', [(1, None), (9, None), (128, None),
                                       (129, 'more than 128 steps')])
def test_a_window_of_many_steps_over_a_trace_is_left_to_xla(T, reason):
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (
        (4, 64, 96, 2), (T, 4, 64), (T, 4, 96, 2), (4, 96, 2, 2), (4, 96, 2))]
    left_to_xla('d_trace_window', given, {'gradient': 'entering'}, 90, reason)


def left_to_xla(name, given, params, capability, reason):
    """By the automatic choice, which says why; not where the kernel is named."""
    operation, here = OPERATIONS[name], choice.Place('interpret', capability, 'none', 1, False)
    found = choice.decide(operation, given, params, 'auto', here)
    assert found.backend == ('jax' if reason else 'triton')
    assert reason is None or reason in found.reason
    named = choice.decide(operation, given, params, 'triton', here)
    assert named.backend == 'triton'


def test_recognisable_in_a_jaxpr(operands):
    assert 'etp_adjoint_window' in str(jax.make_jaxpr(call)(*operands))


def test_a_cpu_never_imports_triton():
    """In a process of its own: every operation is run, and no GPU package is imported."""
    code = """
import sys, jax
from traceops import ops
from traceops.ops.primitive import OPERATIONS
for op in OPERATIONS.values():
    for operands, params in op.cases():
        jax.block_until_ready(op.primitive.bind(*operands, request='auto', devices=None, **params))
ops.report()
print(sorted({'triton', 'jax_triton', 'traceops.ops.gpu'} & set(sys.modules)))
"""
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': os.environ.get('XLA_FLAGS', '')
           + ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'}
    env.pop('TRITON_INTERPRET', None)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == '[]'
