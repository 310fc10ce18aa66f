# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``d_trace_window``: one pass over the trace, in place or not.

A program owns a tile of inputs x outputs, walks its part of the batch, and keeps the tile's
gradient in registers. The trace of a sample is read once and written once. What a window adds to
it, ``sum_s x_s p_s``, is a product of rank T: of many steps it is made on tensor cores with the
accuracy of float32 (:mod:`traceops.kernels.products`), of few (``BK = 0``) step by step.

The states of a position lie side by side in memory. Where their number is a power of two (PACKED),
a tile is read as rows of ``O * S`` elements (128 bits a load where O * S allows it) and parted in
registers, and one product serves all states; else each state is read by itself, from lines that
the first has brought into the cache.
"""

import triton
import triton.language as tl

from traceops.kernels.products import product
from traceops.kernels.states import load_rows, load_states, matvec

__all__ = ['d_trace_window', 'd_trace_window_two_pointers']


@triton.jit
def _split(flat, BI: tl.constexpr, BO: tl.constexpr, S: tl.constexpr):
    """``[BI, BO * S]`` as S tensors ``[BI, BO]``; S is a power of two."""
    if S == 1:
        return (flat,)
    elif S == 2:
        return tl.split(flat.reshape(BI, BO, 2))
    elif S == 4:
        even, odd = tl.split(flat.reshape(BI, BO, 2, 2))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        return (s0, s1, s2, s3)
    else:
        even, odd = tl.split(flat.reshape(BI, BO, 2, 2, 2))
        e0, e2 = tl.split(even)
        o1, o3 = tl.split(odd)
        s0, s4 = tl.split(e0)
        s2, s6 = tl.split(e2)
        s1, s5 = tl.split(o1)
        s3, s7 = tl.split(o3)
        return (s0, s1, s2, s3, s4, s5, s6, s7)


@triton.jit
def _join(values, BI: tl.constexpr, BO: tl.constexpr, S: tl.constexpr):
    """The inverse of :func:`_split`."""
    if S == 1:
        return values[0]
    elif S == 2:
        return tl.join(values[0], values[1]).reshape(BI, BO * 2)
    elif S == 4:
        even = tl.join(values[0], values[2])
        odd = tl.join(values[1], values[3])
        return tl.join(even, odd).reshape(BI, BO * 4)
    else:
        even = tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[6]))
        odd = tl.join(tl.join(values[1], values[5]), tl.join(values[3], values[7]))
        return tl.join(even, odd).reshape(BI, BO * 8)


@triton.jit
def _load_tile(ptr, i, first, I: tl.constexpr, O: tl.constexpr, S: tl.constexpr,
               PACKED: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    """S tensors ``[BI, BO]``, in float32."""
    rows = i[:, None] * (O * S)
    if PACKED:
        c = first * S + tl.arange(0, BO * S)
        live = (i[:, None] < I) & (c[None, :] < O * S)
        flat = tl.load(ptr + rows + c[None, :], mask=live, other=0.).to(tl.float32)
        return _split(flat, BI, BO, S)
    else:
        o = first + tl.arange(0, BO)
        live = (i[:, None] < I) & (o[None, :] < O)
        out = ()
        for s in tl.static_range(S):
            at = rows + o[None, :] * S + s
            out = out + (tl.load(ptr + at, mask=live, other=0.).to(tl.float32),)
        return out


@triton.jit
def _store_tile(ptr, i, first, values, I: tl.constexpr, O: tl.constexpr, S: tl.constexpr,
                PACKED: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    rows = i[:, None] * (O * S)
    narrow = ptr.dtype.element_ty
    if PACKED:
        c = first * S + tl.arange(0, BO * S)
        live = (i[:, None] < I) & (c[None, :] < O * S)
        tl.store(ptr + rows + c[None, :], _join(values, BI, BO, S).to(narrow), mask=live)
    else:
        o = first + tl.arange(0, BO)
        live = (i[:, None] < I) & (o[None, :] < O)
        for s in tl.static_range(S):
            tl.store(ptr + rows + o[None, :] * S + s, values[s].to(narrow), mask=live)


@triton.jit
def _step_by_step(new, inputs, factor, T, B, b, i, o, I: tl.constexpr, O: tl.constexpr,
                  S: tl.constexpr):
    """``new + sum_s x_s p_s``, one step after another."""
    in_i, in_o = i < I, o < O
    for t in range(T):
        at = tl.cast(t * B + b, tl.int64)
        x = tl.load(inputs + at * I + i, mask=in_i, other=0.).to(tl.float32)
        p = load_states(factor, at * O + o, in_o, S)
        grown = ()
        for s in tl.static_range(S):
            grown = grown + (new[s] + x[:, None] * p[s][None, :],)
        new = grown
    return new


@triton.jit
def _columns(inputs, factor, T, B, b, i, column, live, I: tl.constexpr, WIDTH: tl.constexpr,
             BI: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):
    """``sum_s x_s p_s`` of some columns of ``p``, ``[T, B, WIDTH]``: ``[BI, BC]``."""
    total = tl.zeros((BI, BC), tl.float32)
    for first in range(0, T, BK):
        k = first + tl.arange(0, BK)
        at = tl.cast(k, tl.int64) * B + b
        # as columns: transposed after the load, it would be loaded in 32 bits
        x = tl.load(inputs + at[None, :] * I + i[:, None],
                    mask=(k[None, :] < T) & (i[:, None] < I), other=0.)
        p = tl.load(factor + at[:, None] * WIDTH + column[None, :],
                    mask=(k[:, None] < T) & live[None, :], other=0.)
        total += product(x, p, 2, 2, False, BI, BC)
    return total


@triton.jit
def _at_once(new, inputs, factor, T, B, b, i, first, I: tl.constexpr, O: tl.constexpr,
             S: tl.constexpr, PACKED: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
             BK: tl.constexpr):
    """``new + sum_s x_s p_s``, all steps multiplied."""
    if PACKED:
        c = first * S + tl.arange(0, BO * S)
        added = _split(_columns(inputs, factor, T, B, b, i, c, c < O * S, I, O * S, BI, BO * S,
                                BK), BI, BO, S)
    else:
        o = first + tl.arange(0, BO)
        added = ()
        for s in tl.static_range(S):
            added = added + (_columns(inputs, factor, T, B, b, i, o * S + s, o < O, I, O * S, BI,
                                      BO, BK),)
    out = ()
    for s in tl.static_range(S):
        out = out + (new[s] + added[s],)
    return out


@triton.jit
def _paired(total, signal, b, o, in_o, trace, O: tl.constexpr, S: tl.constexpr):
    """``total`` and what the trace of a sample contributes to the gradient."""
    L = load_states(signal, b * O + o, in_o, S)
    for s in tl.static_range(S):
        total += L[s][None, :] * trace[s]
    return total


@triton.jit
def _pass(trace, inputs, factor, transition, signal, T, B, leaving, gradient, I: tl.constexpr,
          O: tl.constexpr, S: tl.constexpr, PART: tl.constexpr, PAIR: tl.constexpr,
          PACKED: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    first = tl.program_id(1) * BO
    o = first + tl.arange(0, BO)
    part = tl.program_id(2)
    in_i, in_o = i < I, o < O
    total = tl.zeros((BI, BO), tl.float32)
    for b in range(part * PART, min(part * PART + PART, B)):
        sample = tl.cast(b, tl.int64) * (I * O * S)
        old = _load_tile(trace + sample, i, first, I, O, S, PACKED, BI, BO)
        rows = load_rows(transition, b * O + o, in_o, S)
        spread = ()
        for k in tl.static_range(S * S):
            spread = spread + (rows[k][None, :],)
        new = matvec(spread, old, S)
        if PAIR == 1:               # before the product, so that it need not keep the old trace
            total = _paired(total, signal, b, o, in_o, old, O, S)
        if BK == 0:
            new = _step_by_step(new, inputs, factor, T, B, b, i, o, I, O, S)
        else:
            new = _at_once(new, inputs, factor, T, B, b, i, first, I, O, S, PACKED, BI, BO, BK)
        if PAIR == 2:
            total = _paired(total, signal, b, o, in_o, new, O, S)
        _store_tile(leaving + sample, i, first, new, I, O, S, PACKED, BI, BO)
    if PAIR > 0:
        live = in_i[:, None] & in_o[None, :]
        tl.store(gradient + tl.cast(part, tl.int64) * (I * O) + i[:, None] * O + o[None, :], total,
                 mask=live)


@triton.jit
def d_trace_window(trace, inputs, factor, transition, signal, T, B, gradient,
                   I: tl.constexpr, O: tl.constexpr, S: tl.constexpr, PART: tl.constexpr,
                   PAIR: tl.constexpr, PACKED: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
                   BK: tl.constexpr):
    _pass(trace, inputs, factor, transition, signal, T, B, trace, gradient, I, O, S, PART, PAIR,
          PACKED, BI, BO, BK)


@triton.jit
def d_trace_window_two_pointers(trace, inputs, factor, transition, signal, T, B, leaving,
                                gradient, I: tl.constexpr, O: tl.constexpr, S: tl.constexpr,
                                PART: tl.constexpr, PAIR: tl.constexpr, PACKED: tl.constexpr,
                                BI: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):
    """Where the trace that leaves has memory of its own; and for jax-triton before 0.4, which
    passes the aliased output a second time."""
    _pass(trace, inputs, factor, transition, signal, T, B, leaving, gradient, I, O, S, PART, PAIR,
          PACKED, BI, BO, BK)
