# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Which residuals the loop over time keeps for the recomputation: a minimum cut.

The recomputation starts from values that are expensive to compute again, or that are carried from
step to step. The first operations on them are often cheap and shrink what has to be stored: the two
states of an adaptive neuron meet in one value, the potential above its threshold, before anything
else reads them. The residuals are therefore a set of values of the least total size that every path
from the sources to the rest of the step passes through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import numpy as np
from jax.extend.core import Literal
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from traceops.compiler.jaxpr import named

__all__ = ['Residual', 'minimum_cut']

#: Capacity of what cannot be cut, and of the largest value.
_ANY, _LARGEST = 2 ** 30, 2 ** 20


@dataclasses.dataclass
class Residual:
    """A residual: ``now``, which is ``before`` one step later, or ``before`` alone.

    Attributes
    ----------
    now : variable or None
        The value of a step.
    before : variable or None
        The same of the step before it, made from what entered.
    """

    now: Any = None
    before: Any = None

    @property
    def variable(self) -> Any:
        """The variable that is stored."""
        return self.before if self.now is None else self.now


def minimum_cut(eqns: Iterable[Any], sources: Sequence[Any], passes: dict[Any, Any], free: Set[Any],
          fixed: Set[Any], wanted: Set[Any], is_expensive: Callable[[Any], bool]) -> list[Residual]:
    """The residuals to store instead of the ``sources``.

    Parameters
    ----------
    eqns : iterable of equations
        What is computed afterwards, in order.
    sources : sequence of variables
        What it reads that differs from step to step, other than the ``free`` ones.
    passes : dict of variables
        Of results that leave a step: as what they enter the next one.
    free : set of variables
        Available without storing them: constants, and slices of inputs.
    fixed : set of variables
        Those of the free ones that are loop-invariant.
    wanted : set of variables
        Results.
    is_expensive : callable
        Whether an equation is; the loop does not compute its results.
    """
    nodes, early, free, fixed = _Nodes(sources, passes), set(sources), set(free), set(fixed)
    edges: set[tuple[int, int]] = set()
    ends: set[Any] = set()
    for eqn in eqns:
        operands = [v for v in eqn.invars if not isinstance(v, Literal)]
        if is_expensive(eqn) or eqn.effects or not all(v in early or v in free for v in operands):
            ends.update(operands)
        elif early.isdisjoint(operands):
            free.update(eqn.outvars)
            fixed.update(eqn.outvars if fixed.issuperset(operands) else ())
        else:
            nodes.add(eqn, fixed)
            early.update(eqn.outvars)
            edges.update((nodes.of[v], nodes.of[w])
                         for v in operands if v in early for w in eqn.outvars)
    ends = {nodes.of[v] for v in (*ends, *wanted) if v in early}
    chosen = _minimum_cut(nodes.sizes, edges, {nodes.of[v] for v in sources}, ends)
    return [nodes.values[n] for n in chosen]


class _Nodes:
    """Variables as nodes: two are one if the one is what the other was a step before."""

    def __init__(self, sources: Iterable[Any], passes: dict[Any, Any]) -> None:
        self.of: dict[Any, int] = {}
        self.values: list[Residual] = []
        self._known: dict[Any, int] = {}
        self._before: set[Any] = set()      # those made of nothing but what entered
        enters = {v_in: v_out for v_out, v_in in passes.items()}
        for v in sources:
            if v in enters:                 # kept as what leaves the step before
                self._put(enters[v], enters[v], False)
        for v in sources:
            if v not in self.of:
                self._put(v, enters.get(v, v), v in enters)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each."""
        avals = [value.variable.aval for value in self.values]
        return [a.size * a.dtype.itemsize for a in avals]

    def _put(self, var: Any, expression: Any, before: bool) -> None:
        slot = 'before' if before else 'now'
        key = expression, var.aval.shape, var.aval.dtype
        node = self._known.get(key)
        if node is None or getattr(self.values[node], slot) is not None:
            node = self._known[key] = len(self.values)
            self.values.append(Residual())
        setattr(self.values[node], slot, var)
        self.of[var] = node
        if before:
            self._before.add(var)

    def add(self, eqn: Any, fixed: Set[Any]) -> None:
        """The results of an equation."""
        operands = [v for v in eqn.invars if not isinstance(v, Literal)]
        before = all(v in self._before or v in fixed for v in operands)

        def name(v: Any) -> Any:
            if isinstance(v, Literal):
                return named(v)
            if v not in self.of:
                return v
            return self.of[v], v in self._before and not before

        given = tuple(map(name, eqn.invars))
        for i, v in enumerate(eqn.outvars):
            self._put(v, (eqn.primitive, str(eqn.params), given, i), before)


def _minimum_cut(sizes: Sequence[int], edges: Iterable[tuple[int, int]], sources: Iterable[int],
                 ends: Iterable[int]) -> list[int]:
    """Nodes of the least total size that every path from ``sources`` to ``ends`` passes through."""
    n = len(sizes)
    if not n:
        return []
    start, stop, unit = 2 * n, 2 * n + 1, max([1, *sizes]) / _LARGEST
    arcs = [*((2 * i, 2 * i + 1, max(1, round(size / unit))) for i, size in enumerate(sizes)),
            *((2 * i + 1, 2 * j, _ANY) for i, j in edges),
            *((start, 2 * i, _ANY) for i in sources), *((2 * i + 1, stop, _ANY) for i in ends)]
    rows, columns, capacity = np.asarray(arcs, np.int32).T
    graph = csr_array((capacity, (rows, columns)), shape=(2 * n + 2, 2 * n + 2))
    left = graph - maximum_flow(graph, start, stop).flow
    left.eliminate_zeros()
    reached = set(breadth_first_order(left, start, return_predecessors=False).tolist())
    return [i for i in range(n) if 2 * i in reached and 2 * i + 1 not in reached]
