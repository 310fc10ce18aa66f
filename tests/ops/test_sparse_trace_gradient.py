# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``sparse_trace_gradient``: the reference and the CPU's form against loops, and as a primitive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.suites import SparseTraceGradientSuite, close, draw
from traceops import ops
from traceops.kernels.sparse_trace_gradient import cpu


class TestSparseTraceGradient(SparseTraceGradientSuite):
    """What a CPU runs."""


class TestSparseTraceGradientBySample(SparseTraceGradientSuite):
    """The same, summed over steps alone."""

    by_sample = True


@pytest.mark.parametrize('by_sample', [False, True])
@pytest.mark.parametrize('block, few', [(2 ** 20, 2 ** 14), (200, 2 ** 14), (200, 16), (1, 7)])
def test_column_blocks(monkeypatch, block, few, by_sample):
    """However the dense product is cut, and however few synapses are looked up at a time."""
    monkeypatch.setattr(cpu, '_BLOCK', block)
    monkeypatch.setattr(cpu, '_AT_A_TIME', few)
    monkeypatch.setattr(cpu, '_LOOK_UP', 10 ** 9)
    suite = SparseTraceGradientSuite()
    suite.by_sample = by_sample
    x, delta = suite.operands(T=3, B=2, I=23, O=31)
    got = cpu.sparse_trace_gradient(x, delta, *suite.pattern(x, delta), by_sample=by_sample,
                                    alone=True)
    close(got, suite.expected(x, delta), 1e-6)


def test_a_source_without_synapses(monkeypatch):
    monkeypatch.setattr(cpu, '_BLOCK', 8)
    x, delta = draw(1, 3, 2, 9), draw(2, 3, 2, 4)
    sources, targets = jnp.asarray([3, 3, 8], jnp.int32), jnp.asarray([1, 0, 3], jnp.int32)
    close(ops.sparse_trace_gradient(x, delta, sources, targets),
          np.einsum('tbk,tbk->k', np.asarray(x)[..., sources], np.asarray(delta)[..., targets]),
          1e-6)


@pytest.mark.usefixtures('float64')
def test_double_precision():
    suite = SparseTraceGradientSuite()
    operands = suite.operands(dtype=jnp.float64)
    close(suite.run(*operands), suite.expected(*operands), 1e-14)


@pytest.mark.parametrize('sizes', [(400, 400, 16000), (2000, 2000, 8000)])
def test_no_array_of_rows_by_synapses(sizes):
    """Of a window of 400 rows, neither form stores more than some rows of synapses."""
    I, O, K = sizes  # noqa: E741
    x, delta = jax.ShapeDtypeStruct((50, 8, I), 'float32'), jax.ShapeDtypeStruct(
        (50, 8, O), 'float32')
    index = jax.ShapeDtypeStruct((K,), 'int32')
    compiled = jax.jit(ops.sparse_trace_gradient).lower(x, delta, index, index).compile()
    operands = 400 * 4 * (I + O)
    assert compiled.memory_analysis().temp_size_in_bytes < operands + 40 * 4 * K + 4 * 2 ** 21


def test_what_does_not_fit_names_the_argument():
    x, delta = SparseTraceGradientSuite().operands()
    index = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r'`targets` has shape \(2,\).*k is 3 in `sources`'):
        ops.sparse_trace_gradient(x, delta, index, index[:2])
    with pytest.raises(TypeError, match='`sources` is float32; it takes int32'):
        ops.sparse_trace_gradient(x, delta, index.astype(jnp.float32), index)
