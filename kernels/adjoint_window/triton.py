# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ``adjoint_window``: one thread walks the steps of one position.

The states and the arriving adjoint stay in registers; the loads of the next STEPS steps are issued
before the arithmetic of these. Each kernel has an entry for every number of relations, for
operands with a trailing axis of states (``adjoint_window_2``: two relations), and for one operand
a state (``adjoint_window_3x1``: three states, one relation), which needs no stacked copies. ONCE
has a bit for each of those that is loop-invariant, the Jacobian's first.
"""

import triton
import triton.language as tl

from traceops.kernels.adjoint_window.launch import MAX_RELATIONS, SEPARATE
from traceops.kernels.states import (
    choose,
    load_each,
    load_rows,
    load_states,
    matvec,
    store_rows,
    store_states,
    transposed_matvec,
)
from traceops.kernels.written import entry_point


@triton.jit
def _load_step(jacobian, vectors, t, n, live, N: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
               JOINED: tl.constexpr, ONCE: tl.constexpr):
    """The rows of the Jacobian, then each of V vectors; the bits of ONCE are in that order."""
    at = tl.cast(tl.maximum(t, 0), tl.int64) * N + n       # past the end: a step that is in cache
    if JOINED and S > 1:
        out = (load_rows(jacobian[0], at, live, S),)
        for v in tl.static_range(V):
            out = out + (load_states(vectors[v][0], at, live, S),)
    else:
        out = (load_each(jacobian, at, n, live, S * S, ONCE),)
        for v in tl.static_range(V):
            out = out + (load_each(vectors[v], at, n, live, S, ONCE >> (S * S + v * S)),)
    return out


@triton.jit
def _load_steps(jacobian, vectors, t, n, live, N: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
                JOINED: tl.constexpr, ONCE: tl.constexpr, STEPS: tl.constexpr):
    """Step t and the STEPS - 1 before it."""
    out = ()
    for j in tl.static_range(STEPS):
        out = out + (_load_step(jacobian, vectors, t - j, n, live, N, S, V, JOINED, ONCE),)
    return out


@triton.jit
def _walk(signal, jacobian, factors, deltas, entering, filtered, T, N: tl.constexpr,
          S: tl.constexpr, R: tl.constexpr, KAPPA: tl.constexpr, FILTER: tl.constexpr,
          ONCE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, JOINED: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    zero = tl.zeros((BLOCK,), tl.float32)
    arriving = ()
    decaying = ()
    for _ in tl.static_range(S):
        arriving = arriving + (zero,)
        decaying = decaying + (zero,)
    vectors = (signal,) + factors
    # numbers of Triton's also where T is Python's; the interpreter spreads no scalar of truth
    last, steady = T - 1 + tl.zeros((), tl.int32), tl.zeros((BLOCK,), tl.int32)
    ahead = _load_steps(jacobian, vectors, last, n, live, N, S, 1 + R, JOINED, ONCE, STEPS)
    for first in range(0, T, STEPS):
        steps = ahead
        ahead = _load_steps(jacobian, vectors, last - first - STEPS, n, live, N, S, 1 + R,
                            JOINED, ONCE, STEPS)
        for j in tl.static_range(STEPS):
            now = steps[j]
            t = last - first - j
            there = t + steady >= 0
            adjoint = ()
            kept = ()
            for s in tl.static_range(S):
                L = now[1][s]
                if FILTER:
                    L = L + decaying[s]
                    kept = kept + (KAPPA * L,)
                else:
                    kept = kept + (decaying[s],)
                adjoint = adjoint + (L + arriving[s],)
            at = tl.cast(t, tl.int64) * N + n
            for r in tl.static_range(R):
                delta = adjoint[0] * now[2 + r][0]
                for s in tl.static_range(1, S):
                    delta += adjoint[s] * now[2 + r][s]
                tl.store(deltas[r] + at, delta, mask=live & there)
            decaying = choose(there, kept, decaying, S)
            arriving = choose(there, transposed_matvec(now[0], adjoint, S), arriving, S)
    store_states(entering, n, live, arriving, S)
    if FILTER:
        store_states(filtered, n, live, decaying, S)


@triton.jit
def _walk_leaving(jacobian, factors, products, totals, leaving, T, N: tl.constexpr,
                  S: tl.constexpr, R: tl.constexpr, KAPPA: tl.constexpr, START: tl.constexpr,
                  ONCE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
                  JOINED: tl.constexpr):
    """All rows of the adjoint of the states after the last step, in one walk.

    The signal is the identity at the last step, and its low-pass before it: without a filter
    (KAPPA 0) nothing. With START the product of all Jacobians is not computed.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    weight = tl.zeros((BLOCK,), tl.float32) + 1.
    zero = tl.zeros((BLOCK,), tl.float32)
    rows = ()
    for _ in tl.static_range(S * S):
        rows = rows + (zero,)
    sums = ()
    for _ in tl.static_range(R * S):
        sums = sums + (zero,)
    last, steady = T - 1 + tl.zeros((), tl.int32), tl.zeros((BLOCK,), tl.int32)
    ahead = _load_steps(jacobian, factors, last, n, live, N, S, R, JOINED, ONCE, STEPS)
    for first in range(0, T, STEPS):
        steps = ahead
        ahead = _load_steps(jacobian, factors, last - first - STEPS, n, live, N, S, R, JOINED,
                            ONCE, STEPS)
        for j in tl.static_range(STEPS):
            now = steps[j]
            t = last - first - j
            there = t + steady >= 0
            adjoint = ()
            for i in tl.static_range(S * S):
                if i % (S + 1) == 0:
                    adjoint = adjoint + (rows[i] + weight,)
                else:
                    adjoint = adjoint + (rows[i],)
            weight = KAPPA * weight
            at = tl.cast(t, tl.int64) * N + n
            more = ()
            for r in tl.static_range(R):
                product = matvec(adjoint, now[1 + r], S)
                store_states(products[r], at, live & there, product, S)
                for s in tl.static_range(S):
                    more = more + (sums[r * S + s] + product[s],)
            earlier = ()
            for i in tl.static_range(S):
                earlier = earlier + transposed_matvec(now[0], adjoint[i * S:i * S + S], S)
            sums = choose(there, more, sums, R * S)
            rows = choose(there, earlier, rows, S * S)
    for r in tl.static_range(R):
        store_states(totals[r], n, live, sums[r * S:r * S + S], S)
    if not START:
        store_rows(leaving, n, live, rows, S)


def _entries(states, relations, joined):
    """The two entry points for so many states and relations."""
    of_state, of_relation = range(1 if joined else states), range(relations)
    signal = tuple(f'L{i}' for i in of_state)
    jacobian = tuple(f'D{i}{j}' for i in of_state for j in of_state)
    factors = tuple(tuple(f'f{r}{i}' for i in of_state) for r in of_relation)
    deltas, products, totals = (tuple(f'{name}{r}' for r in of_relation) for name in 'dps')
    size, known = ('N', 'S', 'KAPPA'), {'R': relations, 'JOINED': joined}
    name = f'{relations}' if joined else f'{states}x{relations}'
    entry_point(globals(), f'adjoint_window_{name}', '_walk', (signal, jacobian, factors),
                (deltas, 'entering', 'filtered'),
                (*size, 'FILTER', 'ONCE', 'BLOCK', 'STEPS'), **known)
    entry_point(globals(), f'leaving_window_{name}', '_walk_leaving', (jacobian, factors),
                (products, totals, 'leaving'),
                (*size, 'START', 'ONCE', 'BLOCK', 'STEPS'), **known)


for _relations in range(1, MAX_RELATIONS + 1):
    _entries(1, _relations, joined=True)
for _states, _most in SEPARATE.items():
    for _relations in range(1, _most + 1):
        _entries(_states, _relations, joined=False)
