# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The weight gradient of a window where inputs are spikes: only of those that are not zero.

Of a spiking layer one input in a hundred is not zero. The product of all rows multiplies the
others as well; here a row of the deltas is added where an input asks for it. Which of the two is
quicker is only known from the values, so the program holds both and counts. It takes longer to
compile, and a little longer to run where it counts in vain.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.sparse import BCSR

__all__ = ['capacity', 'product_of_events']

#: Rows that are counted in one word.
_BITS = 32
#: Multiplications from which, and deltas a row from which, a program is made that counts.
_WORK, _WIDTH = 2 ** 28, 128
#: Of sparse matrices on a CPU.
_DTYPES = (jnp.float32, jnp.float64)
#: Non-zero inputs are few if at most one in so many: adding their rows is work for one core,
#: the product of all is shared by the cores (the two take the same time at one in ten on two).
_FEW, _FEW_A_CORE = 16, 8
#: So many at most, as they are counted in float32.
_EXACT = 2 ** 24 - 1


def capacity(inputs: Any, delta: Any) -> int:
    """How many non-zero inputs (``[R, I]``) are few; 0 where the count is not worth its time."""
    rows, width = delta.shape
    if width < _WIDTH or inputs.size * width < _WORK or inputs.dtype not in _DTYPES:
        return 0
    if rows > _BITS * width or (rows + _BITS) * inputs.shape[1] >= 2 ** 31:     # sums, places
        return 0
    return min(inputs.size // max(_FEW, _FEW_A_CORE * _cores()), _EXACT)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:              # not on macOS and Windows
        return os.cpu_count() or 1


def product_of_events(inputs: Any, delta: Any, product: Callable[..., Any], few: int) -> Any:
    """``product(inputs, delta)``, or the same sum over what is not zero where that is little.

    Parameters
    ----------
    inputs : array, ``[R, I]``
    delta : array, ``[R, O]``
        A value that is not finite meets zeros in the product of all (and gives NaN): then that is
        what is computed.
    product : callable
        ``(inputs, delta) -> [I, O]``, and the derivative of both.
    few : int
        So many non-zero inputs at most are added one by one.
    """
    @jax.custom_jvp
    def chosen(inputs: Any, delta: Any) -> Any:
        words = _words(inputs)
        before, starts = _counted(lax.population_count(words).astype(jnp.float32))
        return lax.cond((starts[-1] <= few) & jnp.isfinite(delta.sum()),
                        lambda *given: _of_events(few, *given), lambda x, d, *_: product(x, d),
                        inputs, delta, words, before, starts)

    chosen.defjvp(lambda primals, tangents: jax.jvp(product, primals, tangents))
    return chosen(inputs, delta)


def _words(inputs: Any) -> Any:
    """Where inputs are not zero: a bit for each, 32 rows a word, ``[W, I]``."""
    rows, width = inputs.shape
    there = jnp.pad(inputs != 0, ((0, -rows % _BITS), (0, 0))).reshape(-1, _BITS, width)
    bits = jnp.uint32(1) << jnp.arange(_BITS, dtype=jnp.uint32)
    return jnp.where(there, bits[:, None], jnp.uint32(0)).sum(1, dtype=jnp.uint32)


def _counted(counts: Any) -> tuple[Any, Any]:
    """How many bits come before each word in its column, and before each column, ``[I + 1]``.

    The former are padded, ``[W + 1, >= I]``. These sums are products with a triangle of ones, in
    float32 (exact below 2^24): they compile in no time, and a cumulative sum takes as long as half
    of everything else here.
    """
    rows, width = counts.shape
    side = math.isqrt(width) + 1                    # columns in a square, with room for one more
    counts = jnp.pad(counts, ((0, 0), (0, side ** 2 - width)))
    within = _dot(_triangle(rows), counts)          # the last row: of whole columns
    sums = _dot(within[-1].reshape(side, side), _triangle(side).T)
    starts = sums[:, :-1] + _dot(_triangle(side)[:-1], sums)[:, -1:]
    return within, starts.reshape(-1)[:width + 1].astype(jnp.int32)


def _triangle(size: int) -> Any:
    """Sums of what comes before each, and of all: ``[size + 1, size]``."""
    return np.tril(np.ones((size + 1, size), np.float32), -1)


def _dot(a: Any, b: Any) -> Any:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _of_events(size: int, inputs: Any, delta: Any, words: Any, before: Any, starts: Any) -> Any:
    """The non-zero inputs as a sparse matrix, ``[I, R]``, times the deltas.

    Each is written where it belongs: after its column's ``starts``, those in the words ``before``,
    and the lower bits of its word.
    """
    rows, width = inputs.shape
    bit = (jnp.uint32(1) << jnp.arange(_BITS, dtype=jnp.uint32))[:, None]
    first = (before[:-1, :width].astype(jnp.int32) + starts[:width])[:, None]
    words = words[:, None]
    lower = lax.population_count(words & (bit - 1)).astype(jnp.int32)
    position = jnp.where(words & bit != 0, first + lower, size).reshape(-1)
    place = jnp.arange(position.size, dtype=jnp.int32)
    places = jnp.zeros(size, jnp.int32).at[position].set(
        place, mode='drop', wrap_negative_indices=False)
    values = inputs.reshape(-1).at[places].get(
        mode='promise_in_bounds', wrap_negative_indices=False)
    row = lax.div(places, np.int32(width))
    return BCSR((values, row, starts), shape=(width, rows)) @ delta
