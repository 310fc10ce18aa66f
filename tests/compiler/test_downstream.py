# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Downstream states are computed after the loop over time, and are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from traceops.compiler.downstream import unroll_of
from traceops.compiler.jaxpr import inlined
from traceops.compiler.partition import partition_step
from traceops.compiler.recompute import recompute, restore, run_downstream
from traceops.compiler.simulation import advance, simulate

T, N = 5, 3


def leaky(v, current):
    return 0.9 * v + current


def readout(x, h, r, W, V):
    h = jnp.tanh(h @ W + x)
    return h, leaky(r, h @ V)


def spiking_readout(x, h, r, W, V):
    h = jnp.tanh(h @ W + x)
    current = h @ V
    for _ in range(10):             # of many equations
        r = leaky(r, jnp.where(r > 1., 0., current))
    return h, r


def fed_through(x, h, r, W, V):
    h = jnp.tanh(h @ W + x)
    return h, h @ V                 # nothing is left to do step by step


def feed_forward(x, h1, h2, W, V):
    h1 = leaky(h1, x @ W)
    return h1, leaky(h2, jnp.maximum(h1, 0.) @ V)


def read_back(x, h, r, W, V):
    h = jnp.tanh(h @ W + x + r)
    return h, leaky(r, h @ V)


def recurrent_readout(x, h, r, W, V):
    h = jnp.tanh(h @ W + x)
    return h, jnp.tanh(r @ V + h)


def nothing_dear(x, h, r, W, V):
    h = jnp.tanh(h @ W + x)
    return h, leaky(r, h)


def noisy_readout(x, h, r, W, V):
    h = jnp.tanh(h @ W + x)
    return h, leaky(r, h @ V * jax.random.normal(jax.random.key(0), r.shape))


def watched(x, h, r, W, V):
    h = jnp.tanh(h @ W + x)
    jax.debug.callback(lambda a: None, r)
    return h, leaky(r, h @ V)


def alike(x, h, r, W, V):
    h = jnp.tanh(h @ W + x)
    return h, h


def split(step, in_loop=(), unroll=1):
    args = [jnp.zeros(N)] * 3 + [jnp.zeros((N, N))] * 2
    closed = inlined(jax.make_jaxpr(lambda *a: (*step(*a), a[2] * 2.))(*args))
    return partition_step(closed, (0, 1, 2), (0, 1), () if in_loop else (2,), (), in_loop,
                      unroll=unroll)


@pytest.mark.parametrize('step, downstream', [
    (readout, ((1,),)), (fed_through, ((1,),)), (feed_forward, ((0,), (1,))), (read_back, ()),
    (recurrent_readout, ()), (nothing_dear, ()), (noisy_readout, ((1,),)), (watched, ()),
    (alike, ())])
def test_which_states_no_other_waits_for(step, downstream):
    assert split(step).downstream == downstream


def test_what_is_needed_in_the_loop_keeps_its_states_there():
    assert split(readout, in_loop=(2,)).downstream == ()


def scaled_readout(x, h, r, W, V):
    h = jnp.tanh(h @ W + x)
    return h, leaky(r, h @ V * jnp.cumsum(V, 0)[1])


def test_no_array_of_steps_and_weights():
    """What is expensive and made of weights alone is the same at every step."""
    partition = split(scaled_readout)
    assert partition.downstream == ((1,),)
    residuals = [jnp.ones((T, N))] * len(partition.residuals)
    args = [jnp.ones((N, N))] * 2, [jnp.ones((T, N))], residuals, [jnp.ones(N)] * 2
    made = jax.make_jaxpr(lambda *args: recompute(
        partition, args[0], run_downstream(partition, *args)).stacked)(*args)
    assert any(v.aval.shape == (T, N) for e in made.eqns for v in e.outvars)
    assert not any(v.aval.shape == (T, N, N) for e in made.eqns for v in e.outvars)


@pytest.mark.parametrize(('step', 'steps', 'turn'), [
    (readout, 7, 7), (readout, 50, 50), (readout, 500, 63), (spiking_readout, 50, 5)])
def test_an_iteration_of_a_group_is_one_kernel(step, steps, turn):
    """Unrolled loops: as many steps as make a kernel of that many equations."""
    assert unroll_of(2, 2 ** 14, steps, 5) == {7: 7, 50: 13, 500: 16}[steps]      # a large state
    assert unroll_of(2, 2 ** 30, steps, 5) == (5 if steps > 7 else 4)
    found = {}
    for unroll in (1, 5):
        partition = split(step, unroll=unroll)
        given = [jnp.ones((N, N))] * 2, [jnp.ones((steps, N))], [jnp.ones((steps, N))] * len(
            partition.residuals), [jnp.ones(N)] * 2
        made = jax.make_jaxpr(
            lambda *a, partition=partition: run_downstream(partition, *a).last)(*given)
        (found[unroll],) = [e.params['unroll'] for e in made.eqns if e.primitive.name == 'scan']
    assert found == {1: 1, 5: turn}


@pytest.mark.parametrize('unroll', [1, 5])
@pytest.mark.parametrize('step', [
    readout, fed_through, scaled_readout, feed_forward, read_back, noisy_readout, alike])
def test_the_states_are_the_same(float64, step, unroll):
    rng = np.random.RandomState(1)
    x, h, r = rng.randn(T, N), rng.randn(N), rng.randn(N)
    weights = [rng.randn(N, N) / 2, rng.randn(N, N)]
    partition = split(step, unroll=unroll)
    core, residuals = [(h, r)[i] for i in partition.core], []
    for one in x:
        core, _, more = simulate(partition, weights, [one], core, {})
        residuals.append(more)
    residuals = [jnp.stack(a) for a in zip(*residuals, strict=True)]
    window_values = run_downstream(partition, weights, [x], residuals, [h, r])
    recorded = [window_values.stacks[v] for v in partition.recorded]
    recalled = recompute(partition, weights, restore(partition, weights, [x], recorded, [h, r]))
    result = recompute(partition, weights, window_values)
    want, before = [h, r], []
    for one in x:
        before.append(want[1] * 2.)
        want = step(one, *want, *weights)
    last = {**dict(zip(partition.core, core, strict=True)), **window_values.last}
    for i in (0, 1):
        assert np.linalg.norm(want[i]) > 0.1
        np.testing.assert_allclose(last[i], want[i], rtol=1e-10)
    np.testing.assert_allclose(result.stacked[0], jnp.stack(before), rtol=1e-10)
    np.testing.assert_array_equal(recalled.stacked[0], result.stacked[0])
    assert [a.shape for a in advance(partition, weights, [x[0]], [h, r], {})[0]] == [(N,), (N,)]
