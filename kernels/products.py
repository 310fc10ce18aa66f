# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Products on tensor cores with the accuracy of float32, shared by the Triton kernels.

An operand is split in registers into the terms that tensor cores multiply: ``x = x0 + x1``,
``d = d0 + d1 + ..``; each term holds the leading bits of what the terms before it left.

Tensor cores round towards zero when they accumulate: over 1600 rows that alone is an error of
1e-5 by norm. So the products of each block of rows start from zero, and blocks are added by
ordinary float32 additions, which round to nearest.
"""

import os

import triton
import triton.language as tl

__all__ = ['product']

#: The interpreter multiplies bfloat16 as if it were integers, and knows no tf32: there the
#: operands of a product stay float32, cut to the bits that they would have.
_INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')


@triton.jit
def _leading(values, BITS: tl.constexpr):
    """Rounded to BITS bits behind the first one, halves away from zero.

    On the bits, not by a conversion there and back, which a compiler may drop. Not for NaN, whose
    bits may overflow; what is left of it then is NaN, in the term that follows.
    """
    unit: tl.constexpr = 1 << (23 - BITS)
    bits = values.to(tl.int32, bitcast=True) + unit // 2
    return (bits & -unit).to(tl.float32, bitcast=True)


@triton.jit
def _operand(values, NARROW: tl.constexpr):
    """As tensor cores take it: bfloat16, or float32 of which they read the first 10 bits."""
    if NARROW:
        if _INTERPRETED:
            return tl.where(values == values, _leading(values, 7), values)
        else:
            return values.to(tl.bfloat16)
    elif _INTERPRETED:
        return (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    else:
        return values


@triton.jit
def _terms(values, COUNT: tl.constexpr, NARROW: tl.constexpr):
    """COUNT operands whose sum is ``values``, but for the bits that the last one has not."""
    BITS: tl.constexpr = 7 if NARROW else 10
    out = ()
    rest = values
    for _ in tl.static_range(COUNT - 1):
        term = _leading(rest, BITS)
        out = out + (_operand(term, NARROW),)
        rest = rest - term
    if COUNT == 1 and not NARROW:           # what tensor cores read of it would be cut, not rounded
        rest = tl.where(rest == rest, _leading(rest, BITS), rest)
    return out + (_operand(rest, NARROW),)


@triton.jit
def product(x, d, X_TERMS: tl.constexpr, D_TERMS: tl.constexpr, NARROW: tl.constexpr,
             BI: tl.constexpr, BO: tl.constexpr):
    """``x d``, a block of rows multiplied: of terms, those products that count, smallest first."""
    xs = _terms(x, X_TERMS, NARROW)
    ds = _terms(d, D_TERMS, NARROW)
    LAST: tl.constexpr = max(X_TERMS, D_TERMS) - 1
    block = tl.zeros((BI, BO), tl.float32)
    for back in tl.static_range(LAST + 1):
        for a in tl.static_range(X_TERMS):
            if LAST - back - a >= 0 and LAST - back - a < D_TERMS:
                block = tl.dot(xs[a], ds[LAST - back - a], block,
                               input_precision='tf32')
    return block
