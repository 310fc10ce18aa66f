# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Launch table of ``es_trace_window``: positions a program walks, and its warps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from traceops.kernels.launch import KernelCall, Tile, ceil_div, generation, steps_ahead

__all__ = ['MAX_STATES', 'TABLE', 'plan']

MAX_STATES = 4

#: (generation, dtype, S) to the tile: ``block`` is positions of a program, and the values that a
#: thread loads ahead. Programs are small, so that few positions spread over all multiprocessors.
TABLE: dict[tuple[int, str, int], Tile] = {
    (g, 'float32', S): Tile((32, 64), warps=1, blocks_per_sm=8)
    for g in (80, 90, 100) for S in (1, 2, 3, 4)}


def plan(signal: Any, jacobian: Any, factor: Any, carry: Any, correction: Any, *,
         capability: int, decay_x: float, decay_f: float, separate: bool = False,
         once: int = 0) -> KernelCall | str:
    """The launch for operands of these shapes, or why there is none.

    ``separate``: states are separate arrays, and ``once`` has a bit for each array of the Jacobian,
    the signal and the factor that is loop-invariant.
    """
    S = signal.shape[-1]
    if signal.dtype != np.float32:
        return f'the kernel computes in float32, the operands are {signal.dtype}'
    if S > MAX_STATES:
        return f'{S} states a position do not fit in registers (at most {MAX_STATES})'
    T, place = signal.shape[0], signal.shape[1:-1]
    N = math.prod(place)
    tile = TABLE[generation(capability), 'float32', S]
    return KernelCall(
        kernel=f'es_trace_window.es_trace_window{f"_{S}" if separate and S > 1 else ""}',
        outputs=(((T, *place), np.float32), (place, np.float32), ((*place, S), np.float32)),
        grid=(ceil_div(N, tile.block[0]),), scalars=(T,),
        constants={'N': N, 'S': S, 'DECAY_X': decay_x, 'DECAY_F': decay_f, 'ONCE': once,
                   'BLOCK': tile.block[0], 'STEPS': steps_ahead(tile.block[1], S * S + 2 * S, T)},
        tile=tile)
