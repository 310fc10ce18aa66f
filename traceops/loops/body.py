# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A loop's body as a graph: who uses what, what is loop-invariant, what is only added to."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from traceops.engine.step import UPDATE, step_of
from traceops.loops.flat import Constant, Flat, Node, Value

__all__ = ['SUMS', 'Body', 'owners_in', 'owners_in_params']

#: Additions, the operations of an accumulator.
SUMS = frozenset(('add', 'add_any', 'sub'))


def owners_in(jaxpr: Any) -> dict[int, tuple[Any, int]]:
    """The learners that take a step anywhere in a jaxpr, by identity, and how many they take."""
    found: dict[int, tuple[Any, int]] = {}

    def add(owner: Any, steps: int) -> None:
        found[id(owner)] = owner, found.get(id(owner), (None, 0))[1] + steps

    for eqn in getattr(jaxpr, 'eqns', ()):
        step = step_of(eqn)
        if step is not None and step.owner is not None:     # else: of a program that outlived it
            add(step.owner, eqn.primitive is UPDATE)
        for owner, steps in owners_in_params(eqn.params):
            add(owner, steps)
    return found


def owners_in_params(params: dict[str, Any]) -> Iterable[tuple[Any, int]]:
    """The same of the programs among the parameters of an equation."""
    for param in params.values():
        for one in param if isinstance(param, (tuple, list)) else (param,):
            yield from owners_in(getattr(one, 'jaxpr', one)).values()


class Body:
    """A loop's body, ``(carry, slice) -> (carry, outputs)``, looked through once.

    Parameters
    ----------
    flat : Flat
        The body.
    carries : int
        How many of its inputs and outputs are carries.

    Attributes
    ----------
    entering, leaving : sequence of Value
        The carries, before a step and after it.
    position : dict
        Of an entering carry, which one it is.
    producer, uses : dict
        Of a value, the node that computes it; those that read it.
    """

    def __init__(self, flat: Flat, carries: int) -> None:
        self.flat, self.carries = flat, carries
        self.entering, self.leaving = flat.inputs[:carries], flat.outputs[:carries]
        self.position = {v: i for i, v in enumerate(self.entering)}
        self.producer = {v: n for n in flat.nodes for v in n.outputs}
        self.uses: dict[Value, list[Node]] = {}
        for node in flat.nodes:
            for v in dict.fromkeys(node.inputs):
                self.uses.setdefault(v, []).append(node)
        self.results = set(flat.outputs)

    @cached_property
    def invariant(self) -> set[Value]:
        """Values that are the same at every step."""
        found = set(self.flat.constants)
        found.update(v for v, w in zip(self.entering, self.leaving, strict=True) if v is w)
        for node in self.flat.nodes:
            if not node.effects and all(self._is_constant(v, found) for v in node.inputs):
                found.update(node.outputs)
        return found

    @staticmethod
    def _is_constant(v: Value, found: set[Value]) -> bool:
        return isinstance(v, Constant) or v in found

    def is_invariant(self, v: Value) -> bool:
        """Whether a value is the same at every step."""
        return self._is_constant(v, self.invariant)

    @cached_property
    def chains(self) -> dict[int, dict[Node, tuple[Value, int]]]:
        """Carries that are only added to: each addition, with its other operand and sign."""
        found = {}
        for i, (v, end) in enumerate(zip(self.entering, self.leaving, strict=True)):
            chain: dict[Node, tuple[Value, int]] = {}
            while v is not end:
                users = self.uses.get(v, [])
                if len(users) != 1 or v in self.results or users[0].name not in SUMS:
                    break
                node = users[0]
                a, b = node.inputs
                if a is b or (node.name == 'sub' and v is b) or node.outputs[0].aval.shape \
                        != v.aval.shape:
                    break
                chain[node] = (b if v is a else a, -1 if node.name == 'sub' else 1)
                v = node.outputs[0]
            if chain and v is end and not self.uses.get(v) and self.flat.outputs.count(v) == 1:
                found[i] = chain
        return found

    @cached_property
    def links(self) -> dict[Node, tuple[int, Value, int]]:
        """Of each of these additions, the carry, the other operand and its sign."""
        return {node: (i, *side) for i, chain in self.chains.items()
                for node, side in chain.items()}
