# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A step cut in two phases gives what the step in one go gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from traceops.compiler.jaxpr import inlined
from traceops.compiler.partition import partition_step
from traceops.compiler.recompute import recompute, run_downstream
from traceops.compiler.simulation import simulate

T, B, N = 6, 3, 4


def step(x, h, key, seen, W, b):
    """One step; h and key are carried, y is wanted of each, and the gradient of W summed."""
    key, now = jax.random.split(key)
    pre = h @ W + x
    new = jnp.tanh(pre) + 0.1 * jax.random.normal(now, h.shape)
    loss, grad = jax.value_and_grad(
        lambda W: (2. * (jnp.cos(h @ W + b) ** 2) / seen).sum())(W)
    count = (new > 0).sum().astype(float)
    return new, key, loss, jnp.exp(pre), grad, -count, grad.T @ b


CARRIED, STACKED, SUMMED = (0, 1), (2, 3), (4, 5, 6)


@pytest.fixture
def partition_and_values():
    rng = np.random.RandomState(0)
    draw = lambda *shape: jnp.asarray(rng.randn(*shape))  # noqa: E731
    x, h, key = draw(T, B, N), draw(B, N), jax.random.key(1)
    constant = (jnp.asarray(2.), draw(N, N), draw(N))
    closed = inlined(jax.make_jaxpr(step)(x[0], h, key, *constant))
    return partition_step(closed, (0, 1, 2), CARRIED, STACKED, SUMMED), x, (h, key), constant


def in_one_go(x, carry, constant):
    out = []
    for one in x:
        *carry, loss, exponential, grad, count, other = step(one, *carry, *constant)
        out.append((loss, exponential, grad, count, other))
    stacks = [jnp.stack(a) for a in zip(*out, strict=True)]
    return carry, stacks[:2], [a.sum(0) for a in stacks[2:]]


def simulated(partition, slices, carry, constant):
    """What the loop over time leaves: core, in-loop outputs of each step, what is residuals."""
    core, in_loop, residuals = [carry[i] for i in partition.core], [], []
    for now in zip(*slices, strict=True):
        core, *more = simulate(partition, constant, now, core, {})
        in_loop.append(more[0])
        residuals.append(more[1])
    stack = lambda found: [jnp.stack(a) for a in zip(*found, strict=True)]  # noqa: E731
    return core, stack(in_loop), stack(residuals)


def recomputed(partition, constant, slices, residuals, first, later=()):
    known = run_downstream(partition, constant, slices, residuals, first)
    return recompute(partition, constant, known, later)


def in_two_phases(partition, x, carry, constant):
    core, _, residuals = simulated(partition, [x], carry, constant)
    result = recomputed(partition, constant, [x], residuals, carry)
    return core, result.stacked, result.sums


def test_the_phases_make_the_step(float64, partition_and_values):
    partition, x, carry, constant = partition_and_values
    (h, key), stacked, sums = in_one_go(x, carry, constant)
    (h2, key2), stacked2, sums2 = in_two_phases(partition, x, carry, constant)
    np.testing.assert_array_equal(h, h2)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(key2))
    for want, got in zip([*stacked, *sums], [*stacked2, *sums2], strict=True):
        assert want.shape == got.shape and want.dtype == got.dtype
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_what_is_kept(partition_and_values):
    """The product and the draw are residuals, not computed twice; the draw stays in the loop.

    Of the state that passes on, what it is after the step; before it, it is that of one earlier.
    """
    partition, *_ = partition_and_values
    x, h = partition.closed.jaxpr.invars[:2]
    assert h not in partition.residuals
    assert partition.entered[h] is partition.closed.jaxpr.outvars[0]
    assert partition.entered[h] in partition.residuals
    names = [e.primitive.name for e in partition.recomputed]
    assert not any(n.startswith('random') for n in names)
    assert names.count('dot_general') == sum(
        e.primitive.name == 'dot_general' for e in partition.closed.jaxpr.eqns) - 1
    assert 'random_bits' in {e.primitive.name for e in partition.simulation}


def test_what_is_finished_later_is_cheap(float64):
    """Products are made of all steps at once, what is cheap in an output a step at a time."""
    def step(x, h, W):
        y = jnp.cos(x) * h
        return jnp.tanh(h + x), jnp.sin(jax.nn.relu(y) @ W) * h + y, jnp.exp(W.sum())

    rng = np.random.RandomState(0)
    x, h, W = rng.randn(T, B, N), rng.randn(B, N), rng.randn(N, N)
    closed = inlined(jax.make_jaxpr(step)(x[0], h, W))
    partition = partition_step(closed, (0, 1), (0,), (1, 2), ())
    states, want = h, []
    for one in x:
        states, now, _ = step(one, states, W)
        want.append(now)
    _, _, residuals = simulated(partition, [x], [h], [W])
    result = recomputed(partition, [W], [x], residuals, [h], later=(1,))
    # x and the product; and h, which is what left the step before
    assert result.stacked == [] and len(result.slices) == 2 and len(result.earlier) == 1
    closed = jax.make_jaxpr(result.later)([a[0] for a in result.slices] + [h])
    assert {'sin', 'mul'} <= {e.primitive.name for e in closed.jaxpr.eqns}
    assert 'dot_general' not in {e.primitive.name for e in closed.jaxpr.eqns}
    order, got = result.backward(lambda seen, out: (2 * seen + out[0].sum(), out[0]), 0., T)
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-12)
    sums = jnp.stack(want).sum((1, 2))
    np.testing.assert_allclose(order, sums @ (2. ** np.arange(T)), rtol=1e-12)


def test_a_sum_over_steps_of_a_product_is_one_product(partition_and_values):
    """No array of steps x weights: the gradient of W contracts the steps as well."""
    partition, x, carry, constant = partition_and_values
    residuals = [jnp.stack([a] * T) for a in simulate(partition, constant, [x[0]], carry, {})[2]]
    closed = jax.make_jaxpr(lambda *args: recomputed(partition, *args).sums)(
        constant, [x], residuals, carry)
    assert not any(v.aval.shape == (T, N, N) for e in closed.jaxpr.eqns for v in e.outvars)


def test_what_is_the_same_at_every_step_is_told_apart():
    def step(x, h, W, b):
        return h @ W + x, x * 2., jnp.exp(W), jnp.zeros(3), b + h

    closed = inlined(jax.make_jaxpr(step)(*(jnp.ones(s) for s in ((N,), (N,), (N, N), (N,)))))
    partition = partition_step(closed, (0, 1), (0,), (1, 2, 3, 4), ())
    assert partition.stacked == (1, 4) and partition.fixed == (2, 3)
    W = jnp.arange(16.).reshape(N, N)
    exponential, zeros = partition.invariants([W, jnp.ones(N)])
    np.testing.assert_array_equal(exponential, jnp.exp(W))
    assert zeros.shape == () and zeros == 0.        # a loop that reads it carries no array
    np.testing.assert_array_equal(partition.whole({3: zeros})[3], jnp.zeros(3), strict=True)


@pytest.mark.parametrize(('read', 'core'), [(False, (0,)), (True, (0, 1))])
def test_a_counter_is_not_counted_in_the_loop_unless_it_is_read(read, core):
    def step(x, h, count):
        after = jnp.where(count >= 0, count + 1, 0)
        return h + x, after, after if read else x * 2.

    closed = inlined(jax.make_jaxpr(step)(1., 2., 3))
    partition = partition_step(closed, (0, 1, 2), (0, 1), (2,), (), counter=1)
    assert partition.core == core and partition.counting == (() if read else (1,))
    for start, end in [(3, 8), (-7, 4)]:            # as the step counts
        residuals = [jnp.ones(5)] * len(partition.residuals)
        window_values = run_downstream(partition, (), [jnp.ones(5)], residuals, [2., start])
        assert window_values.last == ({} if read else {1: end})


def test_effects_stay_in_the_loop():
    heard = []

    def loud(x, h):
        jax.debug.callback(lambda v: heard.append(float(v)), h)
        return h + x, x * 2.

    closed = inlined(jax.make_jaxpr(loud)(1., 2.))
    partition = partition_step(closed, (0, 1), (0,), (1,), ())
    (h,), _, residuals = simulate(partition, (), [1.], [2.], {})
    jax.effects_barrier()
    assert heard == [2.] and h == 3.
    result = recomputed(partition, (), [jnp.ones(1)], [jnp.stack([a]) for a in residuals], [2.])
    assert result.stacked[0][0] == 2.
    assert heard == [2.]


def test_what_is_needed_in_the_loop_comes_from_it(float64):
    """Also what is expensive in it, which its recomputation then does not make again."""
    def step(x, h, W):
        y = jnp.sin(x @ W)
        return jnp.tanh(h + x), h * y, y * 2., jnp.ones(2)

    rng = np.random.RandomState(0)
    x, h, W = rng.randn(T, B, N), rng.randn(B, N), rng.randn(N, N)
    closed = inlined(jax.make_jaxpr(step)(x[0], h, W))
    partition = partition_step(closed, (0, 1), (0,), (2,), (), in_loop=(1, 3))
    assert partition.in_loop == (1,) and partition.fixed == (3,)
    assert 'dot_general' not in {e.primitive.name for e in partition.recomputed}
    _, (in_loop,), residuals = simulated(partition, [x], [h], [W])
    states = h
    for t in range(T):
        np.testing.assert_allclose(in_loop[t], step(x[t], states, W)[1], rtol=1e-12)
        states = step(x[t], states, W)[0]
    np.testing.assert_allclose(
        recomputed(partition, [W], [x], residuals, [h]).stacked[0], jnp.sin(x @ W) * 2., rtol=1e-12)
