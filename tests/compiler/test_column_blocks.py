# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Products with large weights are taken some columns at a time, with the same result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity.test_loops import compare as loop_is_upstreams
from tests.parity.test_loops import tutorial
from tests.parity.test_rules import compare
from traceops.compiler import column_blocks
from traceops.compiler.jaxpr import inlined
from traceops.compiler.partition import partition_step
from traceops.compiler.simulation import advance, products_of, simulate
from traceops.host.explain_calls import LoopsExplanation


def step(x, h, W):
    h = jnp.tanh(jnp.concatenate([x, h], -1) @ W)
    return h, h.sum()


def integrate_and_fire(x, h, W):
    spikes = (h > 1).astype(h.dtype)
    h = 0.9 * h - spikes + jnp.concatenate([x, spikes], -1) @ W
    return h, h.sum()


def partition(batch, n_in, n, asked=True, step=step):
    x, h, W = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (
        (batch, n_in), (batch, n), (n_in + n, n)))
    closed = inlined(jax.make_jaxpr(step)(x, h, W))
    return partition_step(closed, (0, 1), (0,), (1,), (), cpu=asked)


@pytest.mark.parametrize('batch, n_in, n, taken', [
    (8, 50, 2048, True), (8, 50, 2000, True),           # larger than 12 MiB
    (8, 50, 1024, True), (8, 50, 1000, False),          # 4 MiB: only with rows of 4 KiB
    (8, 50, 128, False), (1, 50, 2048, False), (64, 50, 2048, False)])
def test_which_products(batch, n_in, n, taken):
    assert bool(partition(batch, n_in, n).products) == taken
    assert not partition(batch, n_in, n, asked=False).products


@pytest.mark.parametrize('n', [1024, 2000])
def test_the_numbers_are_those_of_the_whole_product(n):
    cut, whole = partition(8, 50, n), partition(8, 50, n, asked=False)
    rng = np.random.RandomState(0)
    W, x, h = (jnp.asarray(rng.randn(*s), jnp.float32) for s in ((50 + n, n), (8, 50), (8, n)))
    assert [c.shape[1] for c in column_blocks.column_blocks_of(W)] == [*[704] * (n // 704), n % 704]
    assert len(products_of(cut, [W])) == 1 and not products_of(whole, [W])

    def run(run, p, W, x, h):
        return run(p, [W], [x], [h], products_of(p, [W]))
    for one in (simulate, advance):
        a, b = (jax.jit(functools.partial(run, one, p))(W, x, h) for p in (cut, whole))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), a, b)
        assert jnp.abs(jax.tree.leaves(a)[0]).min() > 0


@pytest.mark.parametrize('n', [1024, 2000])
def test_spikes_are_those_of_the_whole_product(n):
    """Twenty steps, in which one spike more or less would grow to many."""
    cut, whole = (partition(8, 50, n, asked, integrate_and_fire) for asked in (True, False))
    rng = np.random.RandomState(0)
    W = jnp.asarray(4 * rng.randn(50 + n, n) / n ** .5, jnp.float32)
    xs = jnp.asarray(rng.rand(20, 8, 50) < .1, jnp.float32)
    h = jnp.zeros((8, n), jnp.float32)

    def spikes(p):
        def run(W, xs, h):
            given = products_of(p, [W])
            return jax.lax.scan(lambda h, x: 2 * (simulate(p, [W], [x], h, given)[0],), [h], xs)[1]
        return jax.jit(run)(W, xs, h)[0] > 1
    a, b = spikes(cut), spikes(whole)
    assert cut.products and not whole.products
    assert (a == b).all() and 0.02 < a[1:].mean() < 0.6


def test_weights_are_cut_outside_of_the_loop():
    cut = partition(8, 50, 1024)

    def loop(W, xs, h):
        given = products_of(cut, [W])
        return jax.lax.scan(
            lambda h, x: (simulate(cut, [W], [x], [h], given)[0][0], None), h, xs)[0]

    jaxpr = jax.make_jaxpr(loop)(*(jnp.zeros(s) for s in ((1074, 1024), (5, 8, 50), (8, 1024))))
    (scan,) = (e for e in jaxpr.eqns if e.primitive.name == 'scan')
    inside = [e for e in scan.params['jaxpr'].eqns if e.primitive.name == 'dot_general']
    assert [e.invars[1].aval.shape for e in inside] == [(1074, 704), (1074, 320)]
    assert all(e.invars[1] in scan.params['jaxpr'].jaxpr.invars for e in inside)


@pytest.fixture
def small_cache(monkeypatch):
    """Nets small enough for upstream, as if the cache were smaller still; products it cuts."""
    for name, value in (('WIDTH', 2), ('_LARGE', 0), ('_ROWS', range(1, 64))):
        monkeypatch.setattr(column_blocks, name, value)
    cut = []
    prepared = column_blocks.prepared
    monkeypatch.setattr(column_blocks, 'prepared', lambda *args: cut.append(1) or prepared(*args))
    return cut


@pytest.mark.cpu('column blocks are for a CPU')
@pytest.mark.parametrize('net, rule, carry', [
    ('alif', 'd_rtrl', True), ('lif', 'es', True), ('gru', 'd_rtrl', False),
    pytest.param('two-layer', 'es', True, marks=pytest.mark.slow)])
def test_training(float64, small_cache, net, rule, carry):
    ours = compare(net, rule, False, 7, 3, 1e-10, carry=carry)
    assert small_cache
    assert 'with weights larger than the cache, 2 columns at a time' in str(
        traceops.explain(ours.learner))


@pytest.mark.cpu('column blocks are for a CPU')
def test_a_loop_written_by_hand(float64, small_cache):
    (loop,) = loop_is_upstreams(tutorial, 'alif', 'd_rtrl')
    assert small_cache and loop.products
    assert f'- {loop.where}: {loop.products[0]}' in str(LoopsExplanation((loop,)))
