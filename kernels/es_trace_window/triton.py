# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``es_trace_window``: one thread walks a position forward, then back."""

import triton
import triton.language as tl

from traceops.kernels.states import load_rows, load_states, matvec, store_states

__all__ = ['es_trace_window']


@triton.jit
def _load_step(signal, jacobian, factor, correction, t, T, n, live, N: tl.constexpr,
               S: tl.constexpr):
    t = tl.minimum(t, T - 1)                # past the end: a step that is in cache
    at = tl.cast(t, tl.int64) * N + n
    return (load_states(signal, at, live, S), load_rows(jacobian, at, live, S),
            load_states(factor, at, live, S), tl.load(correction + t))


@triton.jit
def es_trace_window(signal, jacobian, factor, carry, correction, T, filtered, total, leaving,
                    N: tl.constexpr, S: tl.constexpr, DECAY_X: tl.constexpr,
                    DECAY_F: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    g = load_states(carry, n, live, S)
    sum_ = tl.zeros((BLOCK,), tl.float32)
    ahead = _load_step(signal, jacobian, factor, correction, tl.zeros((), tl.int32), T, n, live,
                       N, S)
    for t in range(T):
        now = ahead
        ahead = _load_step(signal, jacobian, factor, correction, t + 1, T, n, live, N, S)
        moved = matvec(now[1], g, S)
        g = ()
        instant = tl.zeros((BLOCK,), tl.float32)
        for s in tl.static_range(S):
            new = DECAY_F * moved[s] + (1. - DECAY_F) * now[2][s]
            instant += now[0][s] * new
            g = g + (new,)
        instant = instant / now[3]
        sum_ += instant
        tl.store(filtered + tl.cast(t, tl.int64) * N + n, instant, mask=live)
    store_states(leaving, n, live, g, S)
    tl.store(total + n, sum_, mask=live)
    if DECAY_X != 0.:
        tl.debug_barrier()          # what this program stored, it now reads back
        later = tl.zeros((BLOCK,), tl.float32)
        for k in range(T):
            at = tl.cast(T - 1 - k, tl.int64) * N + n
            later = tl.load(filtered + at, mask=live, other=0.) + DECAY_X * later
            tl.store(filtered + at, later, mask=live)
