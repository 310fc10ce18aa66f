# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the operations: all of them, the wrong ones named, the faster one advised."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from traceops import benchmarks, ops
from traceops.benchmarks import operations
from traceops.ops.primitive import OPERATIONS


def test_every_operation_and_its_form_for_one_step_has_a_row(tmp_path, monkeypatch, capsys):
    run = operations.run
    monkeypatch.setattr(operations, 'run', lambda repeats: run(repeats, N=12, T=6, B=3))
    assert benchmarks.main(['--operations', '--repeats', '1', '--json', str(tmp_path / 'o')]) == 0
    assert 'trace_gradient bf16x3' in capsys.readouterr().out
    rows = json.loads((tmp_path / 'o').read_text())['rows']
    names = {row['name'].split()[0] for row in rows}
    assert names == {*OPERATIONS, 'es_trace_update', 'd_trace_update'}
    assert {case.operation for case in operations.cases(2, 1, 3)} == set(OPERATIONS)
    assert all(row['use'] == 'jax' and row['microseconds']['jax'] > 0 for row in rows)
    errors = {row['name'].split()[1]: row['error'] for row in rows if row['error'] is not None}
    assert set(errors) == set(ops.PRECISIONS)
    assert errors['highest'] < 1e-6 and 1e-8 < errors['bf16x2'] < 1e-5 < errors['tf32'] < 1e-3


def test_bytes_are_those_of_operands_and_results():
    case = next(c for c in operations.cases(5, 2, 3) if c.name == 'd_trace_update S=2')
    trace, row = 2 * 3 * 3 * 2, 2 * 3 * 2
    want = 4 * (2 * trace + 2 * 3 + 2 * row + 2 * row + 3 * 3)
    assert operations._row(case, 1).bytes == want


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that is off by a factor, on a device where it would be chosen; and its row."""
    monkeypatch.setattr(ops, 'why', lambda *a, **k: ops.Decision('triton', 'kernel'))

    def row(factor, jax_seconds, triton_seconds):
        monkeypatch.setattr(operations, 'interleaved', lambda *a: {
            'jax': [jax_seconds], 'triton': [triton_seconds]})
        case = operations.OperationCase(
            'one', 'adjoint_window',
            lambda a, backend: (a, a * (factor if backend == 'triton' else 1.)),
            (np.ones(1000, np.float32),))
        return operations._row(case, 1)
    return row


def test_the_faster_backend_is_advised(kernel):
    fast = kernel(1., 3e-6, 1e-6)
    assert fast.right and fast.use == 'triton' and fast.reason == '3.00 times faster'
    slow = kernel(1., 1e-6, 2e-6)
    assert slow.right and slow.use == 'jax' and slow.reason == '2.00 times faster'
    assert 'adjoint' not in operations.table([fast]) and '3.00 times' in operations.table([fast])


@pytest.mark.parametrize('factor', [1.001, jnp.nan])
def test_a_wrong_kernel_is_never_advised(kernel, factor):
    wrong = kernel(factor, 3e-6, 1e-6)
    assert not wrong.right and wrong.use == 'jax' and 'report this' in wrong.reason


def test_the_limit_of_known_devices():
    limit = operations._limit
    assert limit('NVIDIA H100 80GB HBM3', 335232) == pytest.approx(0.1)
    assert limit('NVIDIA H100 80GB HBM3', 335232, 10 ** 6, 'bf16') == pytest.approx(0.1)
    assert limit('NVIDIA H100 80GB HBM3', 335232, 989 * 10 ** 6, 'bf16') == pytest.approx(1.)
    assert limit('NVIDIA H100 80GB HBM3', 335232, 495 * 10 ** 6, 'tf32') == pytest.approx(1.)
    assert limit('cpu', 335232) is None


def test_a_product_in_tf32_may_differ_by_its_rounding():
    row = operations.OperationRow('p', 1, {'jax': 1.}, None, 3e-4, None, 'triton', '', 1e-3)
    assert row.right and not operations.dataclasses.replace(row, difference=2e-3).right
    cases = {c.name: c for c in operations.cases(2, 1, 3) if c.operation == 'trace_gradient'}
    assert {c.tolerance for c in cases.values()} == {1e-5, 1e-3}
    assert cases['trace_gradient tf32'].tolerance == 1e-3
    assert cases['trace_gradient bf16x3'].work == (3 * cases['trace_gradient tf32'].work[0], 'bf16')
