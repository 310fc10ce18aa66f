# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The weight gradient of a window from spikes alone: the same sum, and when it is made so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import oracle
from tests.ops.suites.base import close, draw
from traceops import ops
from traceops.kernels.trace_gradient import events

SPARSE = 'cpu_csr_sparse_dense'


@pytest.fixture
def of_any_size(monkeypatch):
    """Small products count, too; few are at most one in four."""
    for name, value in (('_WORK', 0), ('_WIDTH', 1), ('_FEW', 4), ('_FEW_A_CORE', 0)):
        monkeypatch.setattr(events, name, value)


def some(seed, share, *shape, dtype=jnp.float32):
    """Values of any size, most of them zero."""
    there = np.random.default_rng(seed).random(shape) < share
    return jnp.asarray(there, dtype) * draw(seed + 1, *shape, dtype=dtype)


def program(*operands, **options):
    call = lambda *a: ops.trace_gradient(*a, events=True, **options)  # noqa: E731
    return jax.jit(call).lower(*operands).compile()


@pytest.mark.usefixtures('of_any_size', 'float64')
@pytest.mark.parametrize('T, B, I, O', [
    (1, 1, 40, 3), (3, 11, 16, 5), (4, 8, 15, 7), (5, 13, 60, 4), (50, 4, 9, 8), (2, 200, 3, 20)])
def test_the_sum_over_spikes_is_the_product(T, B, I, O):  # noqa: E741
    """More rows than a word has bits and fewer, columns that fill a square and do not."""
    x, delta = some(0, .1, T, B, I, dtype=jnp.float64), draw(2, T, B, O, dtype=jnp.float64)
    compiled = program(x, delta)
    assert SPARSE in compiled.as_text() and 0 < np.count_nonzero(x) <= x.size / 4
    close(compiled(x, delta), oracle.trace_gradient(x, delta), 1e-14)


@pytest.mark.usefixtures('of_any_size')
@pytest.mark.parametrize('count, added', [(0, True), (1, True), (24, True), (25, False),
                                          (96, False)])
def test_of_many_the_product_is_made(count, added):
    """One in four is few: then, and only then, the product is not asked."""
    places = np.random.default_rng(0).permutation(96)[:count]
    x = jnp.zeros(96).at[places].set(2.).reshape(12, 8)
    delta = draw(1, 12, 5)
    few = events.capacity(x, delta)
    assert few == 24
    got = jax.jit(lambda x, d: events.product_of_events(
        x, d, lambda x, d: jnp.full((8, 5), 7.), few))(x, delta)
    want = np.asarray(x).T @ np.asarray(delta) if added else np.full((8, 5), 7.)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures('of_any_size')
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_meets_zeros(value):
    """As in the product of all: nothing times infinity is not a number."""
    x, delta = some(0, .1, 3, 8, 16), draw(2, 3, 8, 4)
    delta = delta.at[1, 2, 3].set(value)
    got, want = (np.asarray(ops.trace_gradient(x, delta, events=e)) for e in (True, False))
    assert np.isnan(want[:, 3]).sum() > 8
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    spike = x.at[1, 2, 0].set(np.nan)       # a spike that is not a number is one
    assert np.isnan(ops.trace_gradient(spike, draw(2, 3, 8, 4), events=True)[0]).all()


@pytest.mark.usefixtures('of_any_size')
def test_the_derivative_is_that_of_the_product():
    x, delta = some(0, .1, 3, 8, 16), draw(2, 3, 8, 4)
    loss = lambda e: lambda x, d: (ops.trace_gradient(x, d, events=e) ** 2).sum()  # noqa: E731
    got, want = (jax.jit(jax.grad(loss(e), (0, 1)))(x, delta) for e in (True, False))
    close(got, want, 1e-5)


@pytest.mark.usefixtures('of_any_size')
def test_what_has_no_sparse_product_has_none():
    """Other dtypes, precisions, a total, one product a sample, one a lane."""
    x, delta = some(0, .1, 3, 8, 16), draw(2, 3, 8, 4)
    narrow = x.astype(jnp.bfloat16), delta.astype(jnp.bfloat16)
    lanes = jax.vmap(lambda x, d: ops.trace_gradient(x, d, events=True))
    for compiled in (program(*narrow), program(x, delta, precision='bf16x2'),
                     program(x, delta, draw(3, 16, 4)), program(x, delta, by_sample=True),
                     jax.jit(lanes).lower(x[None], delta[None]).compile()):
        assert SPARSE not in compiled.as_text()
    assert SPARSE in program(x, delta).as_text()


@pytest.mark.parametrize('T, B, I, O, counts', [
    (50, 32, 1074, 1024, True), (50, 32, 178, 128, False), (50, 32, 2048, 100, False),
    (250, 32, 256, 256, True), (1000, 32, 256, 256, False)])
def test_only_a_large_product_counts(T, B, I, O, counts):  # noqa: E741
    shaped = jax.ShapeDtypeStruct((T * B, I), jnp.float32), jax.ShapeDtypeStruct(
        (T * B, O), jnp.float32)
    assert (events.capacity(*shaped) > 0) == counts


def test_many_cores_share_the_product(monkeypatch):
    """What one core adds is compared with what all multiply."""
    shaped = jax.ShapeDtypeStruct((1600, 1024), jnp.float32)
    found = []
    for cores in (1, 2, 16):
        monkeypatch.setattr(events, '_cores', lambda n=cores: n)
        found.append(events.capacity(shaped, shaped) / shaped.size)
    assert found == [1 / 16, 1 / 16, 1 / 128]


def test_no_more_are_few_than_float32_counts(monkeypatch):
    monkeypatch.setattr(events, '_cores', lambda: 1)
    shaped = jax.ShapeDtypeStruct((2 ** 16, 2 ** 13), jnp.float32)
    assert shaped.size // 16 > 2 ** 24
    assert events.capacity(shaped, shaped) == 2 ** 24 - 1


def test_who_did_not_ask_gets_the_product():
    x, delta = some(0, .1, 50, 32, 600), draw(2, 50, 32, 600)
    compiled = jax.jit(ops.trace_gradient).lower(x, delta).compile()
    assert SPARSE not in compiled.as_text() and SPARSE in program(x, delta).as_text()
