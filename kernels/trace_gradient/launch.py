# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Launch table of ``trace_gradient``: the tile of a program, and when XLA's product is preferred.

``'highest'`` is three tf32 products of two terms each: the error by norm, tensor cores that cut
what they accumulate included, is 2e-7 over 1600 rows, below that of a chain of float32
multiply-adds (7e-7); terms have float32's exponents, so what is small stays what it is. What is
not a number stays none (infinity becomes NaN, as a term of it is infinity minus infinity), and
beyond 3.4e38 (the last 2^-12 of the range) a value counts as infinite. Ordinary float32 arithmetic
(Triton's ``'ieee'``) has two fifths of the operations a second, and is no more accurate.

The automatic choice is the kernel where it saves work, and XLA's product elsewhere:

* ``'tf32'``: one product of one term, which XLA's library makes as well; the kernel serves who
  names it.
* fewer than 16 inputs, outputs or rows: tensor cores would multiply padding.
* sm_90, but for ``'highest'`` of a whole batch, where the kernel takes 0.87 to 1.02 of XLA's time
  (on an H200): for one term of inputs it takes 1.1 to 1.6, by sample 0.93 to 1.16.
* few tiles: the rows would have to be shared out and partial sums added by a second launch, which
  XLA's library does inside of one call.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from traceops.kernels.launch import KernelCall, Tile, ceil_div, generation, power_of_2

__all__ = ['SCHEMES', 'TABLE', 'plan', 'work']

#: Terms of the inputs and of delta, and whether they are bfloat16 (else tf32).
SCHEMES = {'highest': (2, 2, False), 'bf16x3': (1, 3, True), 'bf16x2': (1, 2, True),
           'tf32': (1, 1, False)}

#: (generation, precision, whether tiles are few) to the tile ``(inputs, outputs, rows)``. That of
#: sm_90 was the quickest on an H200 (61 us where 64 x 64 takes 101, 128 x 128 takes 197).
TABLE: dict[tuple[int, str, bool], Tile] = {
    # on sm_100 four warps are given 80 registers a thread, which is a few too little
    (g, precision, few): Tile((128, 32, 32), warps=4, stages=3, blocks_per_sm=2) if g == 90
    else Tile((64, 64, 32), warps=8 if g == 100 else 4, stages=3, blocks_per_sm=2) if few
    else Tile((128, 128, 32), warps=8, stages=3, blocks_per_sm=1)
    for g in (80, 90, 100) for precision in SCHEMES for few in (False, True)}

#: Programs that keep every multiprocessor of the largest device busy, and the fewest that are
#: left as they are.
_ENOUGH, _FEWEST = 148, 64
#: Rows that are worth a program: what it reads and adds then outweighs its partial sum.
_ROWS = 256
#: The smallest side of a product on tensor cores.
_SIDE = 16


def plan(inputs: Any, delta: Any, total: Any = None, *, capability: int, precision: str,
         by_sample: bool, **_: Any) -> KernelCall | str:
    """The launch for these operands, or why there is none."""
    if inputs.dtype != np.float32:
        return f'the kernel computes in float32, the operands are {inputs.dtype}'
    lanes, (T, B, I), O = inputs.shape[:-3], inputs.shape[-3:], delta.shape[-1]
    if by_sample:
        lanes = (*lanes, B)
    V, K = math.prod(lanes), T if by_sample else T * B
    tile, tiles = _tile(generation(capability), precision, V, I, O)
    BI, BO, BK = tile.block
    parts = 1 if tiles >= _FEWEST else min(ceil_div(_ENOUGH, tiles), ceil_div(K, _ROWS))
    chunk = ceil_div(ceil_div(K, parts), BK) * BK
    parts = ceil_div(K, chunk)
    onto = total is not None and parts == 1
    x_terms, d_terms, narrow = SCHEMES[precision]
    operations, unit = work(V * K, I, O, precision)

    def finish(operands: Any, outputs: Any) -> Any:
        sums = outputs[0].reshape(-1, *lanes, I, O)
        sums = sums[0] if parts == 1 else sums.sum(0)
        return (sums if len(operands) == 2 or onto else operands[2] + sums,)

    return KernelCall(
        kernel=f'trace_gradient.trace_gradient{"_onto" * onto}',
        outputs=(((*lanes, I, O) if onto else (parts, *lanes, I, O), np.float32),),
        grid=(tiles, parts), scalars=(K, chunk),
        constants={'I': I, 'O': O, 'G': B if by_sample else 1, 'X_TERMS': x_terms,
                   'D_TERMS': d_terms, 'NARROW': narrow, 'BI': BI, 'BO': BO, 'BK': BK},
        tile=tile, aliases={2: 0} if onto else {},
        prepare=lambda operands: operands[:2 + onto], finish=finish,
        operations=operations, unit=unit,
        rather=_rather(generation(capability), precision, by_sample, K, I, O, parts))


def _tile(generation: int, precision: str, V: int, I: int, O: int) -> tuple[Tile, int]:
    """The large tile where there is enough to do, and how many there are."""
    for few in (False, True):
        tile = TABLE[generation, precision, few]
        block = tuple(max(_SIDE, min(b, power_of_2(n)))
                      for b, n in zip(tile.block, (I, O), strict=False))
        tiles = V * ceil_div(I, block[0]) * ceil_div(O, block[1])
        if tiles >= _ENOUGH:
            break
    return Tile((*block, tile.block[2]), tile.warps, tile.stages, tile.blocks_per_sm), tiles


def work(rows: int, I: int, O: int, precision: str) -> tuple[int, str]:
    """Operations of all products of terms, and what they are done in."""
    x, d, narrow = SCHEMES[precision]
    products = sum(a + b < max(x, d) for a in range(x) for b in range(d))
    return 2 * rows * I * O * products, 'bf16' if narrow else 'tf32'


def _rather(generation: int, precision: str, by_sample: bool, K: int, I: int, O: int,
            parts: int) -> str:
    """Why the automatic choice leaves a product to XLA, or nothing."""
    if precision == 'tf32':
        return "one product of one term, which XLA's library makes as well"
    if min(K, I, O) < _SIDE:
        return f'fewer than {_SIDE} inputs, outputs or rows: tensor cores would multiply padding'
    if generation == 90 and (by_sample or precision != 'highest'):
        return "XLA's library is faster on this generation"
    if parts > 1:
        return "few tiles: XLA's library shares out the rows inside of one call"
    return ''
