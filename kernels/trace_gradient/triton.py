# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``trace_gradient``: a product on tensor cores that reads float32 once.

A program owns a tile of inputs x outputs and walks its part of the rows (steps and samples). What
it has read is split in registers into the terms that tensor cores multiply
(:mod:`traceops.kernels.products`).
"""

import triton
import triton.language as tl

from traceops.kernels.products import product

__all__ = ['trace_gradient', 'trace_gradient_onto', 'trace_gradient_onto_two_pointers']


@triton.jit
def _tile(inputs, delta, total, K, CHUNK, out, I: tl.constexpr, O: tl.constexpr, G: tl.constexpr,
          X_TERMS: tl.constexpr, D_TERMS: tl.constexpr, NARROW: tl.constexpr,
          ADD: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):
    ACROSS: tl.constexpr = (O + BO - 1) // BO
    TILES: tl.constexpr = ACROSS * ((I + BI - 1) // BI)
    lane = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    part = tl.program_id(1)
    i = tile // ACROSS * BI + tl.arange(0, BI)
    o = tile % ACROSS * BO + tl.arange(0, BO)
    # the rows of a lane lie together, or between those of the G lanes (samples) of a step
    rows = tl.cast(lane // G, tl.int64) * K * G + lane % G
    acc = tl.zeros((BI, BO), tl.float32)
    for first in range(part * CHUNK, min(part * CHUNK + CHUNK, K), BK):
        k = first + tl.arange(0, BK)
        at = rows + k * G
        # as columns: transposed after the load, it would be loaded in 32 bits
        x = tl.load(inputs + at[None, :] * I + i[:, None],
                    mask=(k[None, :] < K) & (i[:, None] < I), other=0.)
        d = tl.load(delta + at[:, None] * O + o[None, :],
                    mask=(k[:, None] < K) & (o[None, :] < O), other=0.)
        acc += product(x, d, X_TERMS, D_TERMS, NARROW, BI, BO)
    live = (i[:, None] < I) & (o[None, :] < O)
    lanes = tl.num_programs(0) // TILES
    place = (tl.cast(part, tl.int64) * lanes + lane) * (I * O) + i[:, None] * O + o[None, :]
    if ADD:
        acc += tl.load(total + place, mask=live, other=0.)
    tl.store(out + place, acc, mask=live)


@triton.jit
def trace_gradient(inputs, delta, K, CHUNK, out, I: tl.constexpr, O: tl.constexpr,
                   G: tl.constexpr, X_TERMS: tl.constexpr, D_TERMS: tl.constexpr,
                   NARROW: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):
    """Of ``out[part]`` the product of a part of the rows."""
    _tile(inputs, delta, out, K, CHUNK, out, I, O, G, X_TERMS, D_TERMS, NARROW, False, BI, BO, BK)


@triton.jit
def trace_gradient_onto(inputs, delta, total, K, CHUNK, I: tl.constexpr, O: tl.constexpr,
                        G: tl.constexpr, X_TERMS: tl.constexpr, D_TERMS: tl.constexpr,
                        NARROW: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):
    """Onto what ``total`` holds."""
    _tile(inputs, delta, total, K, CHUNK, total, I, O, G, X_TERMS, D_TERMS, NARROW, True, BI, BO,
          BK)


@triton.jit
def trace_gradient_onto_two_pointers(inputs, delta, total, K, CHUNK, out, I: tl.constexpr,
                                     O: tl.constexpr, G: tl.constexpr, X_TERMS: tl.constexpr,
                                     D_TERMS: tl.constexpr, NARROW: tl.constexpr,
                                     BI: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):
    """For jax-triton before 0.4, which passes the aliased output a second time."""
    _tile(inputs, delta, total, K, CHUNK, out, I, O, G, X_TERMS, D_TERMS, NARROW, True, BI, BO, BK)
