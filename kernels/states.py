# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: states of a position, held as a tuple in registers."""

import triton
import triton.language as tl

__all__ = ['choose', 'load_each', 'load_rows', 'load_states', 'matvec', 'store_rows',
           'store_states', 'transposed_matvec']


@triton.jit
def load_states(ptr, at, live, S: tl.constexpr):
    """S tensors, in float32, of positions ``at`` of an array ``[..., S]``."""
    out = ()
    for s in tl.static_range(S):
        out = out + (tl.load(ptr + at * S + s, mask=live, other=0.).to(tl.float32),)
    return out


@triton.jit
def load_rows(ptr, at, live, S: tl.constexpr):
    """S x S tensors, row by row, of positions ``at`` of an array ``[..., S, S]``."""
    out = ()
    for i in tl.static_range(S * S):
        out = out + (tl.load(ptr + at * (S * S) + i, mask=live, other=0.).to(tl.float32),)
    return out


@triton.jit
def load_each(ptrs, at, n, live, COUNT: tl.constexpr, ONCE: tl.constexpr):
    """Position ``at`` of each of COUNT arrays, ``n`` where a bit of ONCE says: one step for all."""
    out = ()
    for i in tl.static_range(COUNT):
        place = at
        if (ONCE >> i) % 2 == 1:
            place = n.to(tl.int64)
        out = out + (tl.load(ptrs[i] + place, mask=live, other=0.).to(tl.float32),)
    return out


@triton.jit
def store_states(ptr, at, live, values, S: tl.constexpr):
    """Write S tensors to positions ``at`` of an array ``[..., S]``."""
    for s in tl.static_range(S):
        tl.store(ptr + at * S + s, values[s], mask=live)


@triton.jit
def store_rows(ptr, at, live, rows, S: tl.constexpr):
    """Write S x S tensors, row by row, to positions ``at`` of an array ``[..., S, S]``."""
    for i in tl.static_range(S * S):
        tl.store(ptr + at * (S * S) + i, rows[i], mask=live)


@triton.jit
def choose(condition, new, old, COUNT: tl.constexpr):
    """COUNT tensors: ``new`` where the condition holds, else ``old``."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.where(condition, new[i], old[i]),)
    return out


@triton.jit
def matvec(rows, vector, S: tl.constexpr):
    """``D v``."""
    out = ()
    for i in tl.static_range(S):
        acc = rows[i * S] * vector[0]
        for j in tl.static_range(1, S):
            acc += rows[i * S + j] * vector[j]
        out = out + (acc,)
    return out


@triton.jit
def transposed_matvec(rows, vector, S: tl.constexpr):
    """``D^T v``."""
    out = ()
    for j in tl.static_range(S):
        acc = rows[j] * vector[0]
        for i in tl.static_range(1, S):
            acc += rows[i * S + j] * vector[i]
        out = out + (acc,)
    return out
