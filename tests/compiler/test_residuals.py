# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Residuals are a minimum cut, and what is recomputed from them is the same."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traceops.compiler.jaxpr import inlined
from traceops.compiler.partition import partition_step
from traceops.compiler.recompute import recompute, restore, run_downstream
from traceops.compiler.residuals import _minimum_cut
from traceops.compiler.simulation import simulate

T, N = 5, 4


def adaptive(x, v, a, W):
    """Both states meet in the distance to the threshold, before and after the step."""
    spike = (v - 0.1 * a > 0.).astype(float)
    new, adapted = 0.9 * v - spike + spike @ W + x, 0.95 * a + spike
    now = new - 0.1 * adapted
    return new, adapted, jnp.abs(v - 0.1 * a) @ W, jnp.exp(now), jnp.tanh(now) @ W


def two_values(x, v, a, W):
    """Also wanted by itself: nothing is gained."""
    *states, one, two, three = adaptive(x, v, a, W)
    return *states, one, two, three + states[0] ** 2


def spikes_only(x, v, a, W):
    """What is read is a bit."""
    new = 0.9 * v + jnp.tanh(v) @ W + x
    return new, 0.9 * a + new, jnp.where(new > 0., x, 0.), jnp.cos(x), x @ W


def last_step(x, v, a, W):
    """Only what entered is read."""
    new = 0.9 * v + jnp.tanh(v) @ W + x
    return new, 0.9 * a + jnp.sin(new), jnp.cos(v + a) @ W, x, x


def delayed(x, v, a, W):
    """A state that is the other one a step later."""
    new = 0.9 * v + jnp.tanh(a) @ W + x
    return new, v, jnp.cos(a) @ W, jnp.sin(new), jnp.exp(v)


def constant(x, v, a, W):
    """A state that never changes, and one that does not count."""
    return v, jnp.tanh(a @ W), jnp.cos(v) * jnp.tanh(a), x * v, v @ W


def split(step):
    args = [jnp.zeros(N)] * 3 + [jnp.zeros((N, N))]
    closed = inlined(jax.make_jaxpr(step)(*args))
    return partition_step(closed, (0, 1, 2), (0, 1), (2, 3, 4), ())


@pytest.mark.parametrize('step, residuals, entered', [
    (adaptive, ['f'], 1), (two_values, ['f', 'f'], 2), (spikes_only, ['b'], 0),
    (last_step, ['f'], 0), (delayed, ['f', 'f'], 1), (constant, ['f', 'f'], 1)])
def test_what_is_kept(step, residuals, entered):
    partition = split(step)
    assert [v.aval.dtype.kind for v in partition.residuals] == residuals
    assert len(partition.entered) == entered


@pytest.mark.parametrize('step', [
    adaptive, two_values, spikes_only, last_step, delayed, constant])
def test_the_rest_is_the_same(float64, step):
    rng = np.random.RandomState(0)
    x, first, W = rng.randn(T, N), [rng.randn(N), rng.randn(N)], rng.randn(N, N)
    partition, carry, residuals, want, states = split(step), list(first), [], [], list(first)
    carry = [first[i] for i in partition.core]
    for now in x:
        carry, _, more = simulate(partition, [W], [now], carry, {})
        residuals.append(more)
        *states, one, two, three = step(now, *states, W)
        want.append((one, two, three))
    residuals = [jnp.stack(a) for a in zip(*residuals, strict=True)]
    window_values = run_downstream(partition, [W], [x], residuals, first)
    last = {**dict(zip(partition.core, carry, strict=True)), **window_values.last}
    for i, state in enumerate(states):
        np.testing.assert_allclose(last[i], state, rtol=1e-12)
    recorded = [window_values.stacks[v] for v in partition.recorded]
    recalled = restore(partition, [W], [x], recorded, first)
    for found in (window_values, recalled):
        known = dict(zip(partition.stacked, recompute(partition, [W], found).stacked, strict=True))
        assert sorted(known) == [2, 3, 4]
        for i, values in zip((2, 3, 4), zip(*want, strict=True), strict=True):
            assert np.linalg.norm(values) > 0.1
            np.testing.assert_allclose(known[i], jnp.stack(values), rtol=1e-12)


@st.composite
def _graphs(draw):
    n = draw(st.integers(1, 7))
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    nodes = st.sets(st.integers(0, n - 1), min_size=1)
    return (draw(st.lists(st.integers(1, 20), min_size=n, max_size=n)),
            set(draw(st.lists(st.sampled_from(pairs)))) if pairs else set(),
            draw(nodes), draw(nodes))


def _is_cut(n, edges, sources, ends, chosen):
    reached = {i for i in sources if i not in chosen}
    for _ in range(n):
        reached |= {j for i, j in edges if i in reached and j not in chosen}
    return not reached & ends


@given(_graphs())
@settings(max_examples=200, deadline=None)
def test_the_cut_is_the_least(graph):
    sizes, edges, sources, ends = graph
    chosen = set(_minimum_cut(*graph))
    cost = sum(sizes[i] for i in chosen)
    every = (set(c) for k in range(len(sizes) + 1)
             for c in itertools.combinations(range(len(sizes)), k))
    assert _is_cut(len(sizes), edges, sources, ends, chosen)
    assert cost == min(sum(sizes[i] for i in c) for c in every
                       if _is_cut(len(sizes), edges, sources, ends, c))
