# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Downstream states: carried states that no other carried state depends on.

A readout integrates spikes and feeds nothing back; a layer of a feed-forward network depends on the
layer before it and on itself. The expensive part of such a state (the product with its weights)
need not be computed inside the loop over time: for all steps together it is faster, and a loop
of its own, without a product in it, then integrates the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from traceops.compiler.jaxpr import backward_slice, reached

__all__ = ['downstream_groups', 'unroll_of']

#: Equations that one fused GPU kernel may hold; and elements x steps of an iteration squared (a
#: fused kernel recomputes each step from the first of its iteration) that cost no time.
_OF_A_KERNEL, _AT_ONCE = 128, 2 ** 22


def downstream_groups(jaxpr: Any, leaving: Sequence[Any], entering: Sequence[Any],
                      in_loop: Sequence[Any], is_expensive: Callable[[Any], bool],
                      varying: Sequence[Any]) -> list[tuple[int, ...]]:
    """Groups of downstream states, by number, each computable once those before it are.

    Parameters
    ----------
    jaxpr : Jaxpr
        A step.
    leaving, entering : sequence of variables
        Of each state, after and before the step.
    in_loop : sequence of variables
        What else is computed inside the loop over time.
    is_expensive : callable
        Whether an equation is.
    varying : sequence of variables
        Inputs that differ from step to step.

    Returns
    -------
    list of tuple of int
        States in no group stay in the loop: other states or effects there depend on them, an
        expensive operation is part of their recurrence, or nothing expensive leaves with them.
    """
    reads = {i: _read(jaxpr, [v], entering) for i, v in enumerate(leaving)}
    reads[-1] = _read(jaxpr, in_loop, entering, effects=True)
    closure = {i: _closure(reads, i) for i in range(len(leaving))}
    groups = {frozenset({i, *(j for j in found if i in closure[j])})
              for i, found in closure.items()}
    stays = set(range(len(leaving)))
    downstream: list[tuple[int, ...]] = []
    # those with the most dependencies first
    for group in sorted(groups, key=lambda g: (-len(closure[min(g)] | g), min(g))):
        others = stays - group
        if any(reads[i] & group for i in (*others, -1)):
            continue
        eqns, _ = backward_slice(jaxpr, [leaving[i] for i in group])
        there, _ = backward_slice(jaxpr, [*(leaving[i] for i in others), *in_loop], effects=True)
        own = [e for e in eqns if is_expensive(e) and not any(e is other for other in there)]
        recurrent = reached(eqns, [entering[i] for i in group])
        changing = reached(eqns, varying)
        if not any(v in changing for e in own for v in e.outvars):
            continue
        if any(e.effects or (is_expensive(e) and v in recurrent) for e in eqns for v in e.outvars):
            continue
        downstream.insert(0, tuple(sorted(group)))
        stays = others
    return downstream


def unroll_of(equations: int, size: int, steps: int, unroll: int) -> int:
    """Steps in an iteration of the loop of a group with so many ``equations`` and elements.

    Where loops over time are unrolled, as many steps as fuse into one kernel: there is no product
    in it. The kernel computes each step from the first of its iteration, so large states get
    fewer steps. Iterations are of equal length as far as the number of steps allows.
    """
    if unroll == 1:
        return 1
    longest = min(_OF_A_KERNEL // max(1, equations), math.isqrt(_AT_ONCE // max(1, size)))
    iterations = -(-steps // max(unroll, longest))
    return -(-steps // iterations)


def _read(jaxpr: Any, of: Sequence[Any], entering: Sequence[Any],
          effects: bool = False) -> set[int]:
    _, needed = backward_slice(jaxpr, of, effects=effects)
    return {i for i, v in enumerate(entering) if v in needed}


def _closure(reads: dict[int, set[int]], start: int) -> set[int]:
    found: set[int] = set()
    new = reads[start]
    while new - found:
        found |= new
        new = set().union(*(reads[i] for i in new))
    return found
