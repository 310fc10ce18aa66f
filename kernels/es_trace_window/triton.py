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

from traceops.kernels.es_trace_window.launch import MAX_STATES
from traceops.kernels.states import (
    choose,
    load_each,
    load_rows,
    load_states,
    matvec,
    store_states,
)
from traceops.kernels.written import entry_point


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
def _walk(signal, jacobian, factor, carry, correction, filtered, total, leaving, T,
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


def _entry(states):
    """The entry point for so many separate states, or for operands with a trailing axis of them."""
    joined = states is None
    of_state = range(1 if joined else states)
    signal, factor, carry = (tuple(f'{name}{i}' for i in of_state) for name in 'Lfg')
    jacobian = tuple(f'D{i}{j}' for i in of_state for j in of_state)
    entry_point(globals(), 'es_trace_window' if joined else f'es_trace_window_{states}', '_walk',
                (signal, jacobian, factor, carry, 'correction'), ('filtered', 'total', 'leaving'),
                ('N', 'S', 'DECAY_X', 'DECAY_F', 'ONCE', 'BLOCK', 'STEPS'), JOINED=joined)


for _states in (None, *range(2, MAX_STATES + 1)):
    _entry(_states)
