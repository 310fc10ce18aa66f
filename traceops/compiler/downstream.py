# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Which states that pass from step to step no other state waits for.

A readout integrates spikes and feeds nothing back; a layer of a network without recurrence waits
for the one before it and for itself. What is expensive in such a state (the product with its
weights) need not be computed in the loop over time: of all steps at once it is faster, and a loop
of its own then integrates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from traceops.compiler.jaxpr import backward_slice, reached

__all__ = ['downstream_groups', 'unroll_of']

#: Equations that one kernel of a GPU may hold, and elements, times the steps that each is computed
#: from and those of the turn, that take it no time.
_OF_A_KERNEL, _AT_ONCE = 128, 2 ** 22


def downstream_groups(jaxpr: Any, leaving: Sequence[Any], entering: Sequence[Any],
                      in_loop: Sequence[Any], is_expensive: Callable[[Any], bool],
                      varying: Sequence[Any]) -> list[tuple[int, ...]]:
    """Groups of states, by number, each of which can be had after those before it.

    Parameters
    ----------
    jaxpr : Jaxpr
        A step.
    leaving, entering : sequence of variables
        Of each state, after and before the step.
    in_loop : sequence of variables
        What else is had in the loop over time.
    is_expensive : callable
        Whether an equation is.
    varying : sequence of variables
        Inputs that differ from step to step.

    Returns
    -------
    list of tuple of int
        What is in no group stays in the loop: what others there wait for, or the loop's own
        effects; what something expensive is made of; or what has nothing expensive of its own.
    """
    reads = {i: _read(jaxpr, [v], entering) for i, v in enumerate(leaving)}
    reads[-1] = _read(jaxpr, in_loop, entering, effects=True)
    closure = {i: _closure(reads, i) for i in range(len(leaving))}
    groups = {frozenset({i, *(j for j in found if i in closure[j])})
              for i, found in closure.items()}
    stays = set(range(len(leaving)))
    downstream: list[tuple[int, ...]] = []
    # what waits for most comes first
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
    """Steps in a turn of the loop of a group, of so many ``equations`` and elements a step.

    Where the loops over time take turns of ``unroll`` steps, as many as make one kernel: nothing
    in it is a product. It computes every step from the first of its turn, so of large states they
    are fewer. The turns are alike, as far as they go.
    """
    if unroll == 1:
        return 1
    longest = min(_OF_A_KERNEL // max(1, equations), math.isqrt(_AT_ONCE // max(1, size)))
    turns = -(-steps // max(unroll, longest))
    return -(-steps // turns)


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
