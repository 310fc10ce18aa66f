# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Launch table of ``d_trace_window``: the tile of inputs x outputs a program owns."""

from __future__ import annotations

from typing import Any

import numpy as np

from traceops.kernels.launch import KernelCall, Tile, ceil_div, generation, power_of_2

__all__ = ['MAX_STATES', 'TABLE', 'plan']

MAX_STATES = 4

#: (generation, dtype of the trace, S) to the tile ``(inputs, outputs)``.
TABLE: dict[tuple[int, str, int], Tile] = {
    (g, dtype, S): tile
    for g in (80, 90, 100) for dtype in ('float32', 'bfloat16', 'float16')
    for S, tile in {
        1: Tile((32, 64), warps=4, stages=2, blocks_per_sm=4),
        2: Tile((16, 64), warps=4, stages=2, blocks_per_sm=4),
        3: Tile((16, 32), warps=4, stages=2, blocks_per_sm=4),
        4: Tile((16, 32), warps=4, stages=2, blocks_per_sm=4),
    }.items()}

#: The most steps of a window that the kernel adds, one by one, in less time than XLA multiplies
#: them and passes over the trace (on an H200: of one step the kernel takes 0.55 of XLA's time, with
#: two states 0.43, of fifty steps 2.7).
_STEPS = 8
#: Programs that keep every multiprocessor of the largest device busy.
_ENOUGH = 512
_PAIR = {'none': 0, 'entering': 1, 'leaving': 2}


def plan(trace: Any, inputs: Any, factor: Any, transition: Any, signal: Any, *,
         capability: int, gradient: str) -> KernelCall | str:
    """The launch for these operands, or why there is none."""
    (B, I, O, S), T = trace.shape, inputs.shape[0]  # noqa: E741
    if factor.dtype != np.float32:
        return f'the kernel computes in float32, the operands are {factor.dtype}'
    key = generation(capability), np.dtype(trace.dtype).name, S
    if S > MAX_STATES:
        return f'{S} states a position do not fit in registers (at most {MAX_STATES})'
    if key not in TABLE:
        return f'the kernel takes a trace in float32, bfloat16 or float16, not {trace.dtype}'
    tile = TABLE[key]
    BI, BO = (min(b, power_of_2(n)) for b, n in zip(tile.block, (I, O), strict=True))
    tiles = ceil_div(I, BI) * ceil_div(O, BO)
    part = ceil_div(B, min(B, ceil_div(_ENOUGH, tiles)))
    parts = ceil_div(B, part)
    pair = _PAIR[gradient]
    sums = ((parts, I, O) if pair else (1,), np.float32)

    def finish(operands: Any, outputs: Any) -> Any:
        import jax.numpy as jnp
        new, sums = outputs
        if not pair:
            return new, jnp.zeros((I, O), jnp.float32)
        return new, sums[0] if parts == 1 else sums.sum(0)

    return KernelCall(
        kernel='d_trace_window.d_trace_window',
        outputs=((trace.shape, trace.dtype), sums),
        grid=(ceil_div(I, BI), ceil_div(O, BO), parts), scalars=(T, B),
        constants={'I': I, 'O': O, 'S': S, 'PART': part, 'PAIR': pair, 'BI': BI, 'BO': BO},
        tile=tile, aliases={0: 0}, finish=finish,
        operations=2 * B * I * O * S * (S + T + bool(pair)), unit='fp32',
        rather=f"more than {_STEPS} steps: XLA's product of all is faster" if T > _STEPS else '')
