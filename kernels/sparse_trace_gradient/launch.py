# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Launch table of ``sparse_trace_gradient``: the synapses of a program, and rows at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from traceops.kernels.launch import KernelCall, Tile, ceil_div, generation, power_of_2

__all__ = ['TABLE', 'plan']

#: Generation to the tile ``(rows, synapses)``: as many loads under way as registers hold, whose
#: latency is what takes the time.
TABLE: dict[tuple[int], Tile] = {
    (g,): Tile((8, 128), warps=4, stages=2, blocks_per_sm=8) for g in (80, 90, 100)}


def plan(inputs: Any, delta: Any, sources: Any, targets: Any, *, capability: int,
         by_sample: bool, **_: Any) -> KernelCall | str:
    """The launch for these operands, or why there is none."""
    if inputs.dtype != np.float32:
        return f'the kernel computes in float32, the operands are {inputs.dtype}'
    (T, B, I), O = inputs.shape[-3:], delta.shape[-1]
    lanes = (*inputs.shape[:-3], *(B,) * by_sample)
    V, R, K = math.prod(lanes), T if by_sample else T * B, sources.shape[0]
    if V >= 2 ** 16:
        return f'{V} lanes are more than a grid has rows'
    tile = TABLE[generation(capability),]
    BR, BK = tile.block[0], min(tile.block[1], power_of_2(K))
    return KernelCall(
        kernel='sparse_trace_gradient.sparse_trace_gradient',
        outputs=(((*lanes, K), np.float32),), grid=(ceil_div(K, BK), V), scalars=(R, K),
        constants={'I': I, 'O': O, 'G': B if by_sample else 1, 'BR': BR, 'BK': BK},
        tile=tile, operations=2 * V * R * K, unit='fp32')
