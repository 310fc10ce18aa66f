# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Products with sparse weights a row of the result at a time: the same bits."""

import brainevent
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.test_loops import compare as loop_is_upstreams
from tests.parity.test_loops import tutorial
from traceops.compiler.jaxpr import inlined
from traceops.compiler.partition import partition_step
from traceops.compiler.simulation import products_of, simulate

INPUTS, OUTPUTS, B = 60, 50, 8


def pattern(rng, rows, others):
    """In no order, synapses that connect the same, a source and a target without any."""
    rows = [rng.integers(1, others, 12) for _ in range(rows)]
    rows[7] = rows[7][:0]
    starts = np.cumsum([0, *map(len, rows)])
    return jnp.asarray(np.concatenate(rows), jnp.int32), jnp.asarray(starts, jnp.int32)


def programs(kind, dtype=jnp.float32):
    """A step that multiplies, in both forms: ``(weights, x) -> x @ W``."""
    rng = np.random.default_rng(0)
    sides = (INPUTS, OUTPUTS) if kind is brainevent.CSR else (OUTPUTS, INPUTS)
    indices, starts = pattern(rng, *sides)
    shape = (INPUTS, OUTPUTS)
    weights = jnp.asarray(rng.normal(size=indices.size), dtype)
    x = jnp.asarray(rng.normal(size=(B, shape[0])), dtype)

    def step(x, h, w):
        out = x @ kind((w, indices, starts), shape=shape)
        return h + out, out

    h = jnp.zeros((B, shape[1]), dtype)
    closed = inlined(jax.make_jaxpr(step)(x, h, weights))

    def run(cpu):
        cut = partition_step(closed, (0, 1), (0,), (), (), in_loop=(1,), cpu=cpu)
        assert len(cut.products) == cpu
        return lambda w, x: simulate(cut, [w], [x], [h], products_of(cut, [w]))[1][0]
    return run(True), run(False), weights, x


@pytest.mark.parametrize('kind', [brainevent.CSR, brainevent.CSC])
def test_the_bits_are_those_of_the_whole_product(kind):
    ours, whole, w, x = programs(kind)
    a, b = (np.asarray(jax.jit(run)(w, x)) for run in (ours, whole))
    np.testing.assert_array_equal(a, b)
    assert (a != 0).mean() > 0.9
    many = jnp.stack([x, 2 * x, -x])
    lanes, each = (jax.jit(jax.vmap(run, (None, 0))) for run in (ours, whole))
    np.testing.assert_array_equal(lanes(w, many), each(w, many))
    text = lanes.lower(w, many).compile().as_text()
    assert text.count('custom-call(') == 1, text        # of all lanes together


def test_derivatives_and_weights_of_lanes():
    ours, whole, w, x = programs(brainevent.CSR)
    got, want = (jax.grad(lambda w, x, run=run: (run(w, x) ** 2).sum(), (0, 1))(w, x)
                 for run in (ours, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
    several = jnp.stack([w, 2 * w])
    got, want = (jax.vmap(run, (0, None))(several, x) for run in (ours, whole))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.cpu('it is for a CPU')
@pytest.mark.usefixtures('float64')
def test_a_loop_written_by_hand():
    (loop,) = loop_is_upstreams(tutorial, 'sparse', 'es')
    assert loop.products == ('1 product with sparse weights, a row of the result at a time',)
