# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``sparse_trace_gradient``: the reference and the CPU's form against loops, and as a primitive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.suites import SparseTraceGradientSuite, close, draw
from traceops import ops
from traceops.kernels.sparse_trace_gradient import cpu, reference


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
                                    events=True, alone=True)
    close(got, suite.expected(x, delta), 1e-6)


@pytest.fixture
def counting(monkeypatch):
    """Small calls count spikes too; of any number, they are added one at a time."""
    for name, value in (('_WORK', 0), ('_SPIKE', 0), ('_ADD', 1), ('_FEW', 1)):
        monkeypatch.setattr(cpu, name, value)


def spikes(seed, share, *shape):
    there = np.random.default_rng(seed).random(shape) < share
    return jnp.asarray(there, jnp.float32) * draw(seed + 1, *shape)


@pytest.mark.usefixtures('counting')
@pytest.mark.parametrize('by_sample', [False, True])
@pytest.mark.parametrize('share', [0., .1, 1.])
@pytest.mark.parametrize('pattern', ['random', 'one source', 'two', 'one synapse'])
def test_a_spike_at_a_time(monkeypatch, pattern, share, by_sample):
    """Sources of no synapse, of one, and of more than one iteration adds to."""
    T, B, I, O = 7, 3, 50, 40  # noqa: E741
    sources = {'random': np.sort(np.random.default_rng(5).integers(0, I, 300)),
               'one source': np.full(300, 9), 'two': np.repeat([0, I - 1], 150),
               'one synapse': np.asarray([I - 1])}[pattern].astype(np.int32)
    targets = np.random.default_rng(6).integers(0, O, sources.size).astype(np.int32)
    assert pattern in ('random', 'one synapse') or cpu._at_a_time(I, sources.size) < 150
    monkeypatch.setattr(cpu, '_capacity', lambda rows, *_: rows * I)
    x, delta = spikes(0, share, T, B, I), draw(2, T, B, O)
    got = cpu.sparse_trace_gradient(x, delta, sources, targets, by_sample=by_sample, events=True,
                                    alone=True)
    want = np.einsum('tbk,tbk->bk' if by_sample else 'tbk,tbk->k',
                     np.float64(x)[..., sources], np.float64(delta)[..., targets])
    assert want.any() == (share > 0)
    close(got, want, 1e-6) if share else np.testing.assert_array_equal(got, want)


@pytest.mark.usefixtures('counting')
@pytest.mark.parametrize('count, added', [(0, True), (24, True), (25, False), (96, False)])
def test_of_many_spikes_every_row_is_looked_at(monkeypatch, count, added):
    """And of few, none is."""
    monkeypatch.setattr(cpu, '_capacity', lambda *_: 24)
    monkeypatch.setattr(cpu, '_definition', lambda x, d, *_: jnp.full(3, 7.))
    places = np.random.default_rng(0).permutation(96)[:count]
    x, delta = jnp.zeros(96).at[places].set(2.).reshape(4, 3, 8), draw(1, 4, 3, 2000)
    sources, targets = np.int32([1, 4, 4]), np.int32([3, 0, 2])
    got = cpu.sparse_trace_gradient(x, delta, sources, targets, by_sample=False, events=True,
                                    alone=True)
    want = np.einsum('tbk,tbk->k', np.asarray(x)[..., sources], np.asarray(delta)[..., targets])
    np.testing.assert_allclose(got, want if added else np.full(3, 7.), rtol=1e-5)


@pytest.mark.usefixtures('counting')
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_meets_zeros(value):
    """Nothing times infinity is not a number, as in the definition; and a spike may be none."""
    x, delta = spikes(0, .1, 3, 2, 9), draw(2, 3, 2, 400)
    sources, targets = np.int32([1, 4, 4]), np.int32([3, 0, 3])
    for operands in ((x, delta.at[1, 1, 3].set(value)), (x.at[0, 1, 4].set(value), delta)):
        got, want = (np.asarray(f(*operands, sources, targets, by_sample=False, **alone))
                     for f, alone in ((cpu.sparse_trace_gradient, {'events': True, 'alone': True}),
                                      (reference.sparse_trace_gradient, {})))
        assert 0 < (~np.isfinite(want)).sum() < 3
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('sizes, counts', [
    ((400, 1000, 1000, 100_000), True), ((400, 5000, 5000, 500_000), True),
    ((400, 1000, 1000, 20_000), False), ((2 ** 18, 2 ** 13, 8, 2 ** 16), False)])
def test_only_a_large_call_counts(sizes, counts):
    """Counting costs compile time; and places are 32 bits."""
    rows, inputs, outputs, count = sizes
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (
        ((rows, 1, inputs), 'float32'), ((rows, 1, outputs), 'float32'),
        ((count,), 'int32'), ((count,), 'int32'))]
    jaxpr = jax.make_jaxpr(lambda *a: cpu.sparse_trace_gradient(
        *a, by_sample=False, events=True, alone=True))(*shapes)
    assert any(e.primitive.name == 'cond' for e in jaxpr.eqns) == counts


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
