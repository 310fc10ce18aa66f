# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``d_trace_window``: one pass over the trace, in place.

A program owns a tile of inputs x outputs, walks its part of the batch, and keeps the tile's
gradient in registers. The states of a position lie side by side in memory, so a tile is read as
rows of ``O * S`` elements (128 bits a load where O * S allows it) and parted in registers.
"""

import triton
import triton.language as tl

from traceops.kernels.states import load_rows, load_states, matvec

__all__ = ['d_trace_window', 'd_trace_window_two_pointers']


@triton.jit
def _load_tile(ptr, i, first, I: tl.constexpr, O: tl.constexpr, S: tl.constexpr,
               BI: tl.constexpr, BO: tl.constexpr):
    """S tensors ``[BI, BO]``, in float32."""
    rows = i[:, None] * (O * S)
    if S == 3:
        o = first + tl.arange(0, BO)
        out = ()
        live = (i[:, None] < I) & (o[None, :] < O)
        for s in tl.static_range(3):
            at = rows + o[None, :] * 3 + s
            out = out + (tl.load(ptr + at, mask=live, other=0.).to(tl.float32),)
        return out
    else:
        c = first * S + tl.arange(0, BO * S)
        live = (i[:, None] < I) & (c[None, :] < O * S)
        flat = tl.load(ptr + rows + c[None, :], mask=live, other=0.).to(tl.float32)
        if S == 1:
            return (flat,)
        elif S == 2:
            return tl.split(flat.reshape(BI, BO, 2))
        else:
            even, odd = tl.split(flat.reshape(BI, BO, 2, 2))
            s0, s2 = tl.split(even)
            s1, s3 = tl.split(odd)
            return (s0, s1, s2, s3)


@triton.jit
def _store_tile(ptr, i, first, values, I: tl.constexpr, O: tl.constexpr, S: tl.constexpr,
                BI: tl.constexpr, BO: tl.constexpr):
    rows = i[:, None] * (O * S)
    narrow = ptr.dtype.element_ty
    if S == 3:
        o = first + tl.arange(0, BO)
        live = (i[:, None] < I) & (o[None, :] < O)
        for s in tl.static_range(3):
            tl.store(ptr + rows + o[None, :] * 3 + s, values[s].to(narrow), mask=live)
    else:
        c = first * S + tl.arange(0, BO * S)
        live = (i[:, None] < I) & (c[None, :] < O * S)
        if S == 1:
            flat = values[0]
        elif S == 2:
            flat = tl.join(values[0], values[1]).reshape(BI, BO * 2)
        else:
            even = tl.join(values[0], values[2])
            odd = tl.join(values[1], values[3])
            flat = tl.join(even, odd).reshape(BI, BO * 4)
        tl.store(ptr + rows + c[None, :], flat.to(narrow), mask=live)


@triton.jit
def _pass(trace, inputs, factor, transition, signal, T, B, gradient, I: tl.constexpr,
          O: tl.constexpr, S: tl.constexpr, PART: tl.constexpr, PAIR: tl.constexpr,
          BI: tl.constexpr, BO: tl.constexpr):
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    first = tl.program_id(1) * BO
    o = first + tl.arange(0, BO)
    part = tl.program_id(2)
    in_i, in_o = i < I, o < O
    total = tl.zeros((BI, BO), tl.float32)
    for b in range(part * PART, min(part * PART + PART, B)):
        tile = trace + tl.cast(b, tl.int64) * (I * O * S)
        old = _load_tile(tile, i, first, I, O, S, BI, BO)
        rows = load_rows(transition, b * O + o, in_o, S)
        spread = ()
        for k in tl.static_range(S * S):
            spread = spread + (rows[k][None, :],)
        new = matvec(spread, old, S)
        for t in range(T):
            at = t * B + b
            x = tl.load(inputs + tl.cast(at, tl.int64) * I + i, mask=in_i, other=0.).to(tl.float32)
            p = load_states(factor, tl.cast(at, tl.int64) * O + o, in_o, S)
            grown = ()
            for s in tl.static_range(S):
                grown = grown + (new[s] + x[:, None] * p[s][None, :],)
            new = grown
        if PAIR > 0:
            L = load_states(signal, b * O + o, in_o, S)
            for s in tl.static_range(S):
                if PAIR == 1:
                    total += L[s][None, :] * old[s]
                else:
                    total += L[s][None, :] * new[s]
        _store_tile(tile, i, first, new, I, O, S, BI, BO)
    if PAIR > 0:
        live = in_i[:, None] & in_o[None, :]
        tl.store(gradient + tl.cast(part, tl.int64) * (I * O) + i[:, None] * O + o[None, :], total,
                 mask=live)


@triton.jit
def d_trace_window(trace, inputs, factor, transition, signal, T, B, gradient,
                   I: tl.constexpr, O: tl.constexpr, S: tl.constexpr, PART: tl.constexpr,
                   PAIR: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    _pass(trace, inputs, factor, transition, signal, T, B, gradient, I, O, S, PART, PAIR, BI, BO)


@triton.jit
def d_trace_window_two_pointers(trace, inputs, factor, transition, signal, T, B, leaving,
                                gradient, I: tl.constexpr, O: tl.constexpr, S: tl.constexpr,
                                PART: tl.constexpr, PAIR: tl.constexpr, BI: tl.constexpr,
                                BO: tl.constexpr):
    """For jax-triton before 0.4, which passes the aliased output a second time."""
    _pass(trace, inputs, factor, transition, signal, T, B, gradient, I, O, S, PART, PAIR, BI, BO)
