# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``es_trace_window``: one thread walks a position forward, then back.

``es_trace_window`` takes a trailing axis of states, ``es_trace_window_2`` to ``_4`` one operand a
state, which needs no stacked copies. ONCE has a bit for each array of the Jacobian, the signal and
the factor, in this order, that is loop-invariant. The loads of the next STEPS steps are issued
before the arithmetic of these.
"""

import triton
import triton.language as tl

from traceops.kernels.states import (
    choose,
    load_each,
    load_rows,
    load_states,
    matvec,
    store_states,
)

__all__ = ['es_trace_window', 'es_trace_window_2', 'es_trace_window_3', 'es_trace_window_4']


@triton.jit
def _load_step(signal, jacobian, factor, correction, t, T, n, live, N: tl.constexpr,
               S: tl.constexpr, JOINED: tl.constexpr, ONCE: tl.constexpr):
    t = tl.minimum(t, T - 1)                # past the end: a step that is in cache
    at = tl.cast(t, tl.int64) * N + n
    if JOINED and S > 1:
        return (load_states(signal[0], at, live, S), load_rows(jacobian[0], at, live, S),
                load_states(factor[0], at, live, S), tl.load(correction + t))
    else:
        return (load_each(signal, at, n, live, S, ONCE >> (S * S)),
                load_each(jacobian, at, n, live, S * S, ONCE),
                load_each(factor, at, n, live, S, ONCE >> (S * S + S)), tl.load(correction + t))


@triton.jit
def _load_steps(signal, jacobian, factor, correction, t, T, n, live, N: tl.constexpr,
                S: tl.constexpr, JOINED: tl.constexpr, ONCE: tl.constexpr, STEPS: tl.constexpr):
    """Step t and the STEPS - 1 after it."""
    out = ()
    for j in tl.static_range(STEPS):
        out = out + (_load_step(signal, jacobian, factor, correction, t + j, T, n, live, N, S,
                                JOINED, ONCE),)
    return out


@triton.jit
def _load_back(filtered, t, n, live, N: tl.constexpr, STEPS: tl.constexpr):
    """Step t of what was stored, and the STEPS - 1 before it."""
    out = ()
    for j in tl.static_range(STEPS):
        at = tl.cast(tl.maximum(t - j, 0), tl.int64) * N + n
        out = out + (tl.load(filtered + at, mask=live, other=0.),)
    return out


@triton.jit
def _walk(signal, jacobian, factor, carry, correction, T, filtered, total, leaving,
          N: tl.constexpr, S: tl.constexpr, DECAY_X: tl.constexpr, DECAY_F: tl.constexpr,
          ONCE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, JOINED: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    if JOINED:
        g = load_states(carry[0], n, live, S)
    else:
        g = load_each(carry, n, n, live, S, 0)
    sum_ = tl.zeros((BLOCK,), tl.float32)
    # numbers of Triton's also where T is Python's; the interpreter spreads no scalar of truth
    start, steady = tl.zeros((), tl.int32), tl.zeros((BLOCK,), tl.int32)
    ahead = _load_steps(signal, jacobian, factor, correction, start, T, n, live, N, S, JOINED,
                        ONCE, STEPS)
    for first in range(0, T, STEPS):
        steps = ahead
        ahead = _load_steps(signal, jacobian, factor, correction, first + STEPS + start, T, n,
                            live, N, S, JOINED, ONCE, STEPS)
        for j in tl.static_range(STEPS):
            now = steps[j]
            t = first + j + start
            there = t + steady < T
            moved = matvec(now[1], g, S)
            grown = ()
            instant = tl.zeros((BLOCK,), tl.float32)
            for s in tl.static_range(S):
                new = DECAY_F * moved[s] + (1. - DECAY_F) * now[2][s]
                instant += now[0][s] * new
                grown = grown + (new,)
            instant = instant / now[3]
            sum_ += tl.where(there, instant, 0.)
            tl.store(filtered + tl.cast(t, tl.int64) * N + n, instant, mask=live & there)
            g = choose(there, grown, g, S)
    store_states(leaving, n, live, g, S)
    tl.store(total + n, sum_, mask=live)
    if DECAY_X != 0.:
        tl.debug_barrier()          # what this program stored, it now reads back
        later = tl.zeros((BLOCK,), tl.float32)
        back = _load_back(filtered, T - 1 + start, n, live, N, STEPS)
        for first in range(0, T, STEPS):
            instants = back
            back = _load_back(filtered, T - 1 - first - STEPS, n, live, N, STEPS)
            for j in tl.static_range(STEPS):
                t = T - 1 - first - j + start
                there = t + steady >= 0
                later = instants[j] + DECAY_X * later
                tl.store(filtered + tl.cast(t, tl.int64) * N + n, later, mask=live & there)


@triton.jit
def es_trace_window(signal, jacobian, factor, carry, correction, T, filtered, total, leaving,
                    N: tl.constexpr, S: tl.constexpr, DECAY_X: tl.constexpr,
                    DECAY_F: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr,
                    STEPS: tl.constexpr):
    _walk((signal,), (jacobian,), (factor,), (carry,), correction, T, filtered, total, leaving, N,
          S, DECAY_X, DECAY_F, ONCE, BLOCK, STEPS, True)


@triton.jit
def es_trace_window_2(L0, L1, D00, D01, D10, D11, f0, f1, g0, g1, correction, T, filtered, total,
                      leaving, N: tl.constexpr, S: tl.constexpr, DECAY_X: tl.constexpr,
                      DECAY_F: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr,
                      STEPS: tl.constexpr):
    _walk((L0, L1), (D00, D01, D10, D11), (f0, f1), (g0, g1), correction, T, filtered, total,
          leaving, N, S, DECAY_X, DECAY_F, ONCE, BLOCK, STEPS, False)


@triton.jit
def es_trace_window_3(L0, L1, L2, D00, D01, D02, D10, D11, D12, D20, D21, D22, f0, f1, f2, g0, g1,
                      g2, correction, T, filtered, total, leaving, N: tl.constexpr,
                      S: tl.constexpr, DECAY_X: tl.constexpr, DECAY_F: tl.constexpr,
                      ONCE: tl.constexpr, BLOCK: tl.constexpr,
                      STEPS: tl.constexpr):
    _walk((L0, L1, L2), (D00, D01, D02, D10, D11, D12, D20, D21, D22), (f0, f1, f2), (g0, g1, g2),
          correction, T, filtered, total, leaving, N, S, DECAY_X, DECAY_F, ONCE, BLOCK,
          STEPS, False)


@triton.jit
def es_trace_window_4(L0, L1, L2, L3, D00, D01, D02, D03, D10, D11, D12, D13, D20, D21, D22, D23,
                      D30, D31, D32, D33, f0, f1, f2, f3, g0, g1, g2, g3, correction, T, filtered,
                      total, leaving, N: tl.constexpr, S: tl.constexpr, DECAY_X: tl.constexpr,
                      DECAY_F: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr,
                      STEPS: tl.constexpr):
    _walk((L0, L1, L2, L3),
          (D00, D01, D02, D03, D10, D11, D12, D13, D20, D21, D22, D23, D30, D31, D32, D33),
          (f0, f1, f2, f3), (g0, g1, g2, g3), correction, T, filtered, total, leaving, N, S,
          DECAY_X, DECAY_F, ONCE, BLOCK, STEPS, False)
