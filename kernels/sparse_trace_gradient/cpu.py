# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The gradient of a sparse weight as a CPU is quickest with it; in plain JAX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from traceops.kernels.sparse_trace_gradient.reference import sparse_trace_gradient as _definition

__all__ = ['sparse_trace_gradient']

#: What takes the time, in multiplications of a dense product: to look up a synapse in a row, to add
#: a spike to a synapse, and a spike by itself.
_LOOK_UP, _ADD, _SPIKE = 150, 130, 15_000

#: Elements of the dense product of a column block of inputs: it stays in the cache until it is
#: sampled.
_BLOCK = 2 ** 20

#: Synapses that are looked up in a column block at a time.
_AT_A_TIME = 2 ** 14

#: Rows times synapses from which a program is made that counts spikes.
_WORK = 2 ** 25

#: Of non-zero inputs, more than one in so many are not few: their places take memory.
_FEW = 8


def sparse_trace_gradient(inputs: Any, delta: Any, sources: Any, targets: Any, *,
                          by_sample: bool, events: bool, alone: bool) -> Any:
    """As the definition.

    ``events``: inputs may be spikes; ``alone``: no other device shares the call.

    Of a pattern that is not too sparse, it is quicker to multiply all inputs with all outputs, a
    column block of inputs at a time, and to look up the synapses in the product, than to look them
    up in every row. Where few inputs are not zero, as of spikes, only their synapses are added to,
    a spike at a time; how many there are is only known from the values, so the program holds both.
    """
    if inputs.ndim > 3 or not alone:
        return _definition(inputs, delta, sources, targets, by_sample)
    (steps, samples, width), count = inputs.shape, sources.shape[0]
    rows = steps if by_sample else steps * samples
    dense = width * delta.shape[-1] < _LOOK_UP * count
    counts = events and steps * samples * count >= max(_WORK, 1)
    few = _capacity(rows, width, delta.shape[-1], count) if counts else 0

    def one(x: Any, d: Any) -> Any:
        """Of ``[T, B, I]`` and ``[T, B, O]``, summed over both."""
        def by_rows(x: Any, d: Any) -> Any:
            if not dense:
                return _definition(x, d, sources, targets)
            return _in_column_blocks(_as_rows(x), _as_rows(d), sources, targets)

        if not few:
            return by_rows(x, d)
        return lax.cond((jnp.count_nonzero(x) <= few) & jnp.isfinite(d.sum()),
                        lambda x, d: _of_spikes(_as_rows(x), _as_rows(d), sources, targets, few),
                        by_rows, x, d)

    if not by_sample:
        return one(inputs, delta)
    if not (dense or few):
        return _definition(inputs, delta, sources, targets, True)
    return lax.map(lambda sample: one(*(a[:, None] for a in sample)),
                   (jnp.moveaxis(inputs, 1, 0), jnp.moveaxis(delta, 1, 0)))


def _as_rows(a: Any) -> Any:
    return a.reshape(-1, a.shape[-1])


def _at_a_time(width: int, count: int) -> int:
    """Synapses that a spike is added to in one iteration: all, for most inputs of a random net."""
    mean = count / width
    return min(16 * math.ceil((mean + 2 * mean ** 0.5) / 16), count)


def _capacity(rows: int, width: int, outputs: int, count: int) -> int:
    """How many non-zero inputs are few; 0 where places would not be 32 bits."""
    if max(rows * width, rows * outputs) >= 2 ** 31:
        return 0
    others = rows * min(width * outputs, _LOOK_UP * count)
    return min(others // (_SPIKE + _ADD * _at_a_time(width, count)), rows * width // _FEW)


def _of_spikes(x: Any, d: Any, sources: Any, targets: Any, few: int) -> Any:
    """Of ``[R, I]`` and ``[R, O]``, with ``few`` non-zero inputs at most.

    A spike of row r and input i adds ``x[r, i] * d[r, targets]`` to the synapses of i. In the order
    of rows: a row of the deltas stays in the cache, and synapses lie side by side.
    """
    (_, width), count, outputs = x.shape, sources.shape[0], np.int32(d.shape[1])
    values, deltas = x.reshape(-1), d.reshape(-1)
    number = jnp.cumsum((values != 0).astype(jnp.int32))
    places = jnp.zeros(few, jnp.int32).at[jnp.where(values != 0, number - 1, few)].set(
        jnp.arange(values.size, dtype=jnp.int32), mode='drop', wrap_negative_indices=False)
    starts = jnp.searchsorted(sources, np.arange(width + 1, dtype=np.int32),
                              method='scan_unrolled').astype(jnp.int32)
    size = _at_a_time(width, count)
    targets = jnp.pad(targets, (0, size))           # what is read last may reach beyond the end

    def add(state: Any) -> Any:
        spike, done, found = state
        place = places[spike]
        row = lax.div(place, np.int32(width))
        source = place - row * np.int32(width)
        first = starts[source] + done
        left = starts[source + 1] - first
        near = deltas.at[row * outputs + lax.dynamic_slice_in_dim(targets, first, size)].get(
            mode='promise_in_bounds', wrap_negative_indices=False)
        added = jnp.where(np.arange(size, dtype=np.int32) < left, values[place] * near, 0)
        found = lax.dynamic_update_slice_in_dim(
            found, lax.dynamic_slice_in_dim(found, first, size) + added, first, 0)
        more = left > size
        return spike + ~more, jnp.where(more, done + np.int32(size), 0), found

    return lax.while_loop(lambda state: state[0] < number[-1], add,
                          (jnp.int32(0), jnp.int32(0), jnp.zeros(count + size, d.dtype)))[2][:count]


def _in_column_blocks(x: Any, d: Any, sources: Any, targets: Any) -> Any:
    """Of ``[R, I]`` and ``[R, O]``."""
    width, outputs, count = x.shape[1], d.shape[1], sources.shape[0]

    def sampled(inputs: Any) -> Callable[[Any, Any], Any]:
        product = lax.dot_general(inputs, d, (((0,), (0,)), ((), ())),
                                  precision=lax.Precision.HIGHEST).reshape(-1)
        return lambda i, o: product.at[i * np.int32(outputs) + o].get(
            mode='promise_in_bounds', wrap_negative_indices=False)

    size = min(width, max(1, _BLOCK // outputs))
    if size == width:
        return sampled(x)(sources, targets)
    blocks = -(-width // size)
    few = min(count, _AT_A_TIME)
    first = jnp.searchsorted(sources, np.arange(blocks + 1, dtype=np.int32) * size,
                             method='scan_unrolled').astype(jnp.int32)
    # the last column block, and what is looked up last, may reach beyond the end
    x = jnp.pad(x, ((0, 0), (0, blocks * size - width)))
    sources, targets = (jnp.pad(a, (0, few)) for a in (sources, targets))

    def block(p: Any, found: Any) -> Any:
        start = p * np.int32(size)
        product = sampled(lax.dynamic_slice_in_dim(x, start, size, 1))

        def look_up(state: Any) -> Any:
            k, found = state
            i, o = (lax.dynamic_slice_in_dim(a, k, few) for a in (sources, targets))
            # beyond the column block is what the next one overwrites
            values = product(jnp.clip(i - start, 0, size - 1), o)
            return k + np.int32(few), lax.dynamic_update_slice_in_dim(found, values, k, 0)

        return lax.while_loop(lambda state: state[0] < first[p + 1], look_up,
                              (first[p], found))[1]

    found = jnp.zeros(count + few, d.dtype)
    return lax.fori_loop(np.int32(0), np.int32(blocks), block, found)[:count]
