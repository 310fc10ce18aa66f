# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Signals that are multiples of one array: found where they are, and left alone elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from traceops.compiler.jaxpr import inlined
from traceops.compiler.partition import is_expensive
from traceops.compiler.shared_signal import SharedSignal, shared_signals

B, N, O = 3, 4, 2  # noqa: E741
AHEAD = (0,)


def late(h, e, W):
    """What is only known in the recomputation: a product with the error."""
    return jnp.tanh(h @ W + e) @ W.T


def of_one_state(h, e, W):
    return jnp.cos(h), [jnp.exp(h) * late(h, e, W)]


def of_two_states(h, e, W, stacked=True):
    """As the derivative through a spike gives them: joined, and cut apart again."""
    r = late(h, e, W)
    zero = jnp.zeros_like(h)
    one, other = zero + jnp.exp(h) * r / 2., -(jnp.where(h > 0., r, zero) * 3.)
    both = jnp.stack([one, other], -1) if stacked else jnp.concatenate(
        [one[..., None], other[..., None]], -1)
    return jnp.cos(h), [both[..., 0], both[..., 1]]


def of_two_joined(h, e, W):
    return of_two_states(h, e, W, stacked=False)


def with_an_empty_one(h, e, W):
    return jnp.cos(h), [h * late(h, e, W)[:, None].reshape(B, N), jnp.zeros_like(h)]


def of_two_arrays(h, e, W):
    return jnp.cos(h), [h * late(h, e, W), h * late(h, 2 * e, W)]


def with_a_constant(h, e, W):
    return jnp.cos(h), [h * late(h, e, W) + h]


def squared(h, e, W):
    """Nothing on the way is linear: the square itself is all that it is a multiple of."""
    return jnp.cos(h), [h * late(h, e, W) ** 2]


def shuffled(h, e, W):
    return jnp.cos(h), [h * late(h, e, W)[:, ::-1] * 2.]


def of_a_part(h, e, W):
    return jnp.cos(h), [h * late(h, e, W)[:, :1]]


def itself(h, e, W):
    return jnp.cos(h), [late(h, e, W)]


def early(h, e, W):
    return jnp.cos(h), [jnp.exp(h) * e.sum()]


def found_in(step):
    rng = np.random.RandomState(0)
    args = [jnp.asarray(rng.randn(*shape)) for shape in ((B, N), (B, O), (N, O))]
    closed = inlined(jax.make_jaxpr(step)(*args))
    signals = list(range(1, len(closed.jaxpr.outvars)))
    more, (place,) = shared_signals(closed, [signals], AHEAD, is_expensive)
    return signals, place, jax.core.eval_jaxpr(more.jaxpr, more.consts, *args)


@pytest.mark.parametrize('step', [
    of_one_state, of_two_states, of_two_joined, with_an_empty_one, squared, shuffled])
def test_signals_are_scales_times_what_comes_late(float64, step):
    signals, place, out = found_in(step)
    assert isinstance(place, SharedSignal) and len(place.scales) == len(signals)
    states = [np.cos(out[0]) + i for i in range(len(signals))]
    paired = SharedSignal([out[i] for i in place.scales], None).paired(states)
    want = sum(out[i] * a for i, a in zip(signals, states, strict=True))
    assert np.linalg.norm(want) > 0.1
    of = SharedSignal((), out[place.of][None])
    np.testing.assert_allclose(paired[None] * of.like(paired[None]), want[None], rtol=1e-12)


@pytest.mark.parametrize('step', [
    of_two_arrays, with_a_constant, of_a_part, itself, early])
def test_others_are_left_alone(step):
    signals, place, out = found_in(step)
    assert place == signals and len(out) == len(signals) + 1


def test_at_hand_they_are_multiples_of_one():
    paired = SharedSignal([jnp.asarray([2.]), jnp.asarray([3.])], None).paired([1., 10.])
    assert paired.tolist() == [32.]
    assert SharedSignal((), None).like(paired) == 1.
