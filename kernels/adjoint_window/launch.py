# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Launch table of ``adjoint_window``: positions a program walks, and its warps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from traceops.kernels.launch import KernelCall, Tile, ceil_div, generation, steps_ahead

__all__ = ['MAX_RELATIONS', 'MAX_STATES', 'SEPARATE', 'TABLE', 'is_separate', 'plan']

MAX_STATES, MAX_RELATIONS = 4, 4

#: (generation, dtype, S) to the tile: ``block`` is positions of a program, and the values that a
#: thread loads ahead. Programs are small, so that few positions spread over all multiprocessors.
TABLE: dict[tuple[int, str, int], Tile] = {
    (g, 'float32', S): Tile((32, 64), warps=1, blocks_per_sm=8)
    for g in (80, 90, 100) for S in (1, 2, 3, 4)}


#: Forms with one operand a state: how many relations each number of states may have. Others are
#: joined first. (Of one state the two forms are the same.)
SEPARATE = {1: 4, 2: 4, 3: 1, 4: 1}


def is_separate(states: int, relations: int) -> bool:
    """Whether a kernel takes the states as they are."""
    return relations <= SEPARATE.get(states, 0)


def plan(jacobian: Any, *factors: Any, capability: int, kappa: float | None, leaving: str,
         separate: bool, once: int = 0) -> KernelCall | str:
    """The launch for operands of these shapes, or why there is none.

    ``leaving``: as in :mod:`traceops.ops.adjoint_window`. ``once`` has a bit for each operand, the
    Jacobian's first, that is loop-invariant (where states are separate arrays).
    """
    S = jacobian.shape[-1]
    if jacobian.dtype != np.float32:
        return f'the kernel computes in float32, the operands are {jacobian.dtype}'
    if S > MAX_STATES:
        return f'{S} states a position do not fit in registers (at most {MAX_STATES})'
    R = len(factors)
    if not 1 <= R <= MAX_RELATIONS:
        return f'the kernel serves 1 to {MAX_RELATIONS} relations a group, here {R}'
    T, place = jacobian.shape[0], jacobian.shape[1:-2]
    N = math.prod(place)
    tile = TABLE[generation(capability), 'float32', S]
    form = {'grid': (ceil_div(N, tile.block[0]),), 'scalars': (T,), 'tile': tile}
    constants = {'N': N, 'S': S, 'KAPPA': kappa or 0., 'ONCE': once, 'BLOCK': tile.block[0],
                 'STEPS': steps_ahead(tile.block[1], S * S + (R if leaving else R + 1) * S, T)}
    name = f'{S}x{R}' if separate and S > 1 else R
    last = ((*place, S), np.float32)
    nothing = ((1,), np.float32)        # placeholder of a result that is not computed
    if leaving:
        start = leaving == 'start'
        return KernelCall(
            kernel=f'adjoint_window.leaving_window_{name}', **form,
            constants={**constants, 'START': start},
            outputs=(*(((T, *place, S), np.float32) for _ in factors), *(last for _ in factors),
                     nothing if start else ((*place, S, S), np.float32)),
            finish=(lambda operands, outputs: tuple(outputs[:-1])) if start else None)
    return KernelCall(
        kernel=f'adjoint_window.adjoint_window_{name}',
        outputs=(*(((T, *place), np.float32) for _ in factors), last,
                 last if kappa is not None else nothing),
        constants={**constants, 'FILTER': kappa is not None}, **form,
        finish=None if kappa is not None else lambda operands, outputs: tuple(outputs[:-1]))
