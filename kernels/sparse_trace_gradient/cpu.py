# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The gradient of a sparse weight as a CPU is quickest with it; in plain JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from traceops.kernels.sparse_trace_gradient.reference import sparse_trace_gradient as _definition

__all__ = ['sparse_trace_gradient']

#: To look up a synapse in a row takes as long as so many multiplications of a dense product.
_LOOK_UP = 150

#: Elements of the dense product of a column block of inputs: it stays in the cache until it is
#: sampled.
_BLOCK = 2 ** 20

#: Synapses that are looked up in a column block at a time.
_AT_A_TIME = 2 ** 14


def sparse_trace_gradient(inputs: Any, delta: Any, sources: Any, targets: Any, *,
                          by_sample: bool, alone: bool) -> Any:
    """As the definition; ``alone``: no other device shares the call.

    Of a pattern that is not too sparse, it is quicker to multiply all inputs with all outputs, a
    column block of inputs at a time, and to look up the synapses in the product, than to look them
    up in every row.
    """
    dense = inputs.shape[-1] * delta.shape[-1] < _LOOK_UP * sources.shape[0]
    if inputs.ndim > 3 or not alone or not dense:
        return _definition(inputs, delta, sources, targets, by_sample)
    if by_sample:
        return lax.map(lambda one: _in_column_blocks(one[0], one[1], sources, targets),
                       (jnp.moveaxis(inputs, 1, 0), jnp.moveaxis(delta, 1, 0)))
    x, d = (a.reshape(-1, a.shape[-1]) for a in (inputs, delta))
    return _in_column_blocks(x, d, sources, targets)


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
