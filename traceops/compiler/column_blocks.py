# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Products with large weights in the loop over time, in blocks of columns (on a CPU).

XLA's product copies all of the weights into blocks before it multiplies. Of weights larger than
the cache that copy passes through memory at every step, and rows a multiple of 4 KiB apart fall
into the same sets of the cache, so that it is slow much earlier. A block of columns, contiguous,
has neither problem. Each column keeps its order of summation, so spikes, which may depend on the
last bit, stay upstream's. (With transposed weights a step is faster still, but the order changes.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ['VARYING', 'WIDTH', 'column_blocks_of', 'describe', 'prepared', 'takes']

#: The operand that differs from step to step.
VARYING = 0

#: Columns of a block: of up to some 2000 inputs, a few MiB. A multiple of 64, so that a block ends
#: where a tile of the whole product does, and what is left over is the same in both. (448 to 768
#: take the same time; each block is a kernel to compile.)
WIDTH = 704

#: Bytes of the weights from which on column blocks are faster, and those for rows that collide.
_LARGE, _LARGE_COLLIDING = 12 * 2 ** 20, 4 * 2 ** 20
_COLLIDING = 2 ** 12

#: Rows of the other operand: with one or two there is no copy, with many it is soon paid for.
_ROWS = range(4, 64)


def takes(operation: Any, operands: Sequence[Any], varies: Callable[[Any], bool],
          is_known: Callable[[Any], bool]) -> bool:
    """Whether an equation (or node) is a product with large loop-invariant weights."""
    left, right = operands
    (_, contracted), (batch, _) = operation.params['dimension_numbers']
    if batch or tuple(contracted) != (0,) or right.aval.ndim != 2 or (
            varies(right) or not varies(left)):
        return False
    inputs, columns = right.aval.shape
    row = columns * right.aval.dtype.itemsize
    large = _LARGE if row % _COLLIDING else _LARGE_COLLIDING
    return inputs * row >= large and left.aval.size // inputs in _ROWS


def column_blocks_of(weights: Any) -> list[Any]:
    """``weights``, ``[inputs, outputs]``, in blocks of :data:`WIDTH` columns."""
    # the barrier keeps the copies out of the loop, and whole
    return [jax.lax.optimization_barrier(weights[:, start:start + WIDTH])
            for start in range(0, weights.shape[1], WIDTH)]


def prepared(operation: Any, weights: Any) -> Callable[[Any], Any]:
    """The operation as a function of its left operand."""
    blocks = column_blocks_of(weights)
    return lambda left: jnp.concatenate([
        operation.primitive.bind(left, block, **operation.params) for block in blocks], -1)


def describe(count: int) -> list[str]:
    """What ``explain`` says where ``count`` products are taken in column blocks."""
    return [f'{count} product{"s" * (count > 1)} with weights larger than the cache, '
            f'{WIDTH} columns at a time'] if count else []
