# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``adjoint_window``: one thread walks the steps of one position.

The states and the arriving adjoint stay in registers; the loads of the next step are issued
before the arithmetic of this one.
"""

import triton
import triton.language as tl

from traceops.kernels.states import load_rows, load_states, store_states, transposed_matvec

__all__ = ['adjoint_window_1', 'adjoint_window_2', 'adjoint_window_3', 'adjoint_window_4']


@triton.jit
def _load_step(signal, jacobian, factors, t, n, live, N: tl.constexpr, S: tl.constexpr,
               R: tl.constexpr):
    at = tl.cast(tl.maximum(t, 0), tl.int64) * N + n       # past the end: a step that is in cache
    out = (load_states(signal, at, live, S), load_rows(jacobian, at, live, S))
    for r in tl.static_range(R):
        out = out + (load_states(factors[r], at, live, S),)
    return out


@triton.jit
def _walk(signal, jacobian, factors, deltas, entering, filtered, T, N: tl.constexpr,
          S: tl.constexpr, R: tl.constexpr, KAPPA: tl.constexpr, FILTER: tl.constexpr,
          BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    zero = tl.zeros((BLOCK,), tl.float32)
    arriving = ()
    decaying = ()
    for _ in tl.static_range(S):
        arriving = arriving + (zero,)
        decaying = decaying + (zero,)
    ahead = _load_step(signal, jacobian, factors, T - 1 + tl.zeros((), tl.int32), n, live,
                       N, S, R)
    for k in range(T):
        t = T - 1 - k
        now = ahead
        ahead = _load_step(signal, jacobian, factors, t - 1, n, live, N, S, R)
        adjoint = ()
        kept = ()
        for s in tl.static_range(S):
            L = now[0][s]
            if FILTER:
                L = L + decaying[s]
                kept = kept + (KAPPA * L,)
            else:
                kept = kept + (decaying[s],)
            adjoint = adjoint + (L + arriving[s],)
        decaying = kept
        at = tl.cast(t, tl.int64) * N + n
        for r in tl.static_range(R):
            delta = adjoint[0] * now[2 + r][0]
            for s in tl.static_range(1, S):
                delta += adjoint[s] * now[2 + r][s]
            tl.store(deltas[r] + at, delta, mask=live)
        arriving = transposed_matvec(now[1], adjoint, S)
    store_states(entering, n, live, arriving, S)
    if FILTER:
        store_states(filtered, n, live, decaying, S)


@triton.jit
def adjoint_window_1(signal, jacobian, f0, T, d0, entering, filtered, N: tl.constexpr,
                     S: tl.constexpr, KAPPA: tl.constexpr, FILTER: tl.constexpr,
                     BLOCK: tl.constexpr):
    _walk(signal, jacobian, (f0,), (d0,), entering, filtered, T, N, S, 1, KAPPA, FILTER, BLOCK)


@triton.jit
def adjoint_window_2(signal, jacobian, f0, f1, T, d0, d1, entering, filtered, N: tl.constexpr,
                     S: tl.constexpr, KAPPA: tl.constexpr, FILTER: tl.constexpr,
                     BLOCK: tl.constexpr):
    _walk(signal, jacobian, (f0, f1), (d0, d1), entering, filtered, T, N, S, 2, KAPPA, FILTER,
          BLOCK)


@triton.jit
def adjoint_window_3(signal, jacobian, f0, f1, f2, T, d0, d1, d2, entering, filtered,
                     N: tl.constexpr, S: tl.constexpr, KAPPA: tl.constexpr,
                     FILTER: tl.constexpr, BLOCK: tl.constexpr):
    _walk(signal, jacobian, (f0, f1, f2), (d0, d1, d2), entering, filtered, T, N, S, 3, KAPPA,
          FILTER, BLOCK)


@triton.jit
def adjoint_window_4(signal, jacobian, f0, f1, f2, f3, T, d0, d1, d2, d3, entering, filtered,
                     N: tl.constexpr, S: tl.constexpr, KAPPA: tl.constexpr,
                     FILTER: tl.constexpr, BLOCK: tl.constexpr):
    _walk(signal, jacobian, (f0, f1, f2, f3), (d0, d1, d2, d3), entering, filtered, T, N, S, 4,
          KAPPA, FILTER, BLOCK)
