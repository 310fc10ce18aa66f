# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Launch table of ``d_trace_window``: the tile of inputs x outputs a program owns."""

from __future__ import annotations

from typing import Any

import numpy as np

from traceops.kernels.launch import KernelCall, Tile, ceil_div, generation, power_of_2
from traceops.kernels.trace_gradient.launch import work

__all__ = ['MAX_STATES', 'TABLE', 'plan']

MAX_STATES = 8

#: Inputs and outputs of a tile by the number of states, for few steps and for many.
_TILES = {
    False: {1: (32, 64), 2: (16, 64), 3: (16, 32), 4: (16, 32), 5: (16, 16), 6: (16, 16),
            7: (16, 16), 8: (16, 16)},
    True: {1: (64, 64), 2: (64, 32), 3: (32, 16), 4: (64, 16), 5: (16, 16), 6: (16, 16),
           7: (16, 16), 8: (32, 8)}}

#: (generation, dtype of the trace, S, whether steps are many) to the tile
#: ``(inputs, outputs, steps)``; no steps: they are added one by one.
TABLE: dict[tuple[int, str, int, bool], Tile] = {
    (g, dtype, S, many): Tile((*block, 16 if many else 0), warps=4, stages=2,
                              blocks_per_sm=2 if many else 3 if S == 7 else 4)
    for g in (80, 90, 100) for dtype in ('float32', 'bfloat16', 'float16')
    for many, blocks in _TILES.items() for S, block in blocks.items()}

#: The most steps that are added one by one (measured on an H200: of one step that takes 0.55 of
#: XLA's time, with two states 0.43, of fifty 2.7); more are multiplied on tensor cores.
_FEW = 8
#: The most steps whose product takes no longer than the pass over the trace, by the peak rates of
#: an A100, whose tensor cores are slowest beside its memory.
_MOST = 128
#: The smallest side of a product on tensor cores.
_SIDE = 16
#: Programs that keep every multiprocessor of the largest device busy.
_ENOUGH = 512
_PAIR = {'none': 0, 'entering': 1, 'leaving': 2}


def plan(trace: Any, inputs: Any, factor: Any, transition: Any, signal: Any, *,
         capability: int, gradient: str, in_place: bool = True) -> KernelCall | str:
    """The launch for these operands, or why there is none."""
    (B, I, O, S), T = trace.shape, inputs.shape[0]  # noqa: E741
    if factor.dtype != np.float32:
        return f'the kernel computes in float32, the operands are {factor.dtype}'
    key = generation(capability), np.dtype(trace.dtype).name, S, T > _FEW
    if S > MAX_STATES:
        return f'{S} states a position do not fit in registers (at most {MAX_STATES})'
    if key not in TABLE:
        return f'the kernel takes a trace in float32, bfloat16 or float16, not {trace.dtype}'
    tile = TABLE[key]
    packed = S == power_of_2(S)
    BI, BO, BK = _block(tile, I, O, S if packed else 1)
    tiles = ceil_div(I, BI) * ceil_div(O, BO)
    part = ceil_div(B, min(B, ceil_div(_ENOUGH, tiles)))
    parts = ceil_div(B, part)
    pair = _PAIR[gradient]
    steps = ceil_div(T, BK) * BK if BK else T
    operations, unit = work(B * steps, I, O * S, 'highest') if BK else (
        2 * B * I * O * S * (S + T + bool(pair)), 'fp32')
    sums = ((parts, I, O) if pair else (1,), np.float32)

    def finish(operands: Any, outputs: Any) -> Any:
        import jax.numpy as jnp
        new, sums = outputs
        if not pair:
            return new, jnp.zeros((I, O), jnp.float32)
        return new, sums[0] if parts == 1 else sums.sum(0)

    return KernelCall(
        kernel=f'd_trace_window.d_trace_window{"" if in_place else "_two_pointers"}',
        outputs=((trace.shape, trace.dtype), sums),
        grid=(ceil_div(I, BI), ceil_div(O, BO), parts), scalars=(T, B),
        constants={'I': I, 'O': O, 'S': S, 'PART': part, 'PAIR': pair,
                   'PACKED': packed, 'BI': BI, 'BO': BO, 'BK': BK},
        tile=tile, aliases={0: 0} if in_place else {}, finish=finish, operations=operations,
        unit=unit,
        rather=f"more than {_MOST} steps: the product takes longer than the pass over the trace, "
               f"and XLA's library makes it as well" if T > _MOST else '')


def _block(tile: Tile, I: int, O: int, width: int) -> tuple[int, int, int]:  # noqa: E741
    """The tile of a program, no larger than the trace; ``width`` columns an output."""
    BI, BO, BK = tile.block
    least = (_SIDE, max(1, _SIDE // width)) if BK else (1, 1)
    BI, BO = (max(few, min(b, power_of_2(n)))
              for b, n, few in zip((BI, BO), (I, O), least, strict=True))
    return BI, BO, BK
