# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A jaxpr as a flat list of operations, to be cut up and computed in parts.

Nested calls are opened (each time anew, so that every value has one producer); loops and
branches stay single operations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from traceops.compiler.jaxpr import CALLS, changes_nothing

__all__ = ['Constant', 'Flat', 'Node', 'Value', 'apply', 'evaluate', 'flatten', 'needed', 'read']


class Value:
    """A result of a node, or an input."""

    __slots__ = ('aval',)

    def __init__(self, aval: Any) -> None:
        self.aval = aval


class Constant(Value):
    """A value known in advance."""

    __slots__ = ('value',)

    def __init__(self, value: Any, aval: Any) -> None:
        super().__init__(aval)
        self.value = value


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operation."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    effects: Any

    @property
    def name(self) -> str:
        return str(self.primitive.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A program: ``constants`` are the values closed over, ``inputs`` the arguments."""

    nodes: tuple[Node, ...]
    constants: tuple[Value, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def flatten(closed: ClosedJaxpr, closed_over: int = 0) -> Flat:
    """The flat form of a program, of whose arguments the first few are closed over."""
    nodes: list[Node] = []

    def fresh(variables: Iterable[Any]) -> tuple[Value, ...]:
        return tuple(Value(v.aval) for v in variables)

    def open_(jaxpr: Any, env: dict[Any, Value]) -> tuple[Value, ...]:
        def known(v: Any) -> Value:
            return Constant(v.val, v.aval) if isinstance(v, Literal) else env[v]
        for eqn in jaxpr.eqns:
            inputs = tuple(map(known, eqn.invars))
            inner = eqn.params.get(CALLS.get(eqn.primitive.name, ''))
            if inner is not None:
                consts = [Constant(c, v.aval) for c, v in
                          zip(inner.consts, inner.jaxpr.constvars, strict=True)]
                names = (*inner.jaxpr.constvars, *inner.jaxpr.invars)
                outputs = open_(inner.jaxpr, dict(zip(names, (*consts, *inputs), strict=True)))
            elif changes_nothing(eqn):
                outputs = inputs
            else:
                outputs = fresh(eqn.outvars)
                nodes.append(Node(eqn.primitive, eqn.params, inputs, outputs, eqn.effects))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return tuple(map(known, jaxpr.outvars))

    constants, inputs = fresh(closed.jaxpr.constvars), fresh(closed.jaxpr.invars)
    names = (*closed.jaxpr.constvars, *closed.jaxpr.invars)
    outputs = open_(closed.jaxpr, dict(zip(names, (*constants, *inputs), strict=True)))
    # tracers look ahead, and leave what they looked at behind: drop what nothing needs
    return Flat(tuple(needed(nodes, outputs)), (*constants, *inputs[:closed_over]),
                inputs[closed_over:], outputs)


def needed(nodes: Sequence[Node], outputs: Iterable[Value],
           inputs_of: Callable[[Node], Iterable[Value]] = lambda node: node.inputs,
           ) -> list[Node]:
    """The nodes that ``outputs`` need, in order; one with an effect is always needed."""
    wanted = set(outputs)
    kept = []
    for node in reversed(nodes):
        if node.effects or any(v in wanted for v in node.outputs):
            kept.append(node)
            wanted.update(inputs_of(node))
    return kept[::-1]


def read(env: dict[Value, Any], value: Value) -> Any:
    """A value, computed or constant."""
    return jnp.asarray(value.value, value.aval.dtype) if isinstance(value, Constant) \
        and not jax.dtypes.issubdtype(value.aval.dtype, jax.dtypes.extended) \
        else value.value if isinstance(value, Constant) else env[value]


def evaluate(nodes: Iterable[Node], env: dict[Value, Any]) -> None:
    """Compute nodes in order; ``env`` has their operands and is given their results."""
    for node in nodes:
        operands = [v.value if isinstance(v, Constant) else env[v] for v in node.inputs]
        env.update(zip(node.outputs, apply(node, operands), strict=True))


def apply(node: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of a node (or of what else has a primitive and its parameters) on operands."""
    given = node.primitive.get_bind_params(node.params)
    functions, params = given if isinstance(given, tuple) else ((), given)      # jax < 0.11
    results = node.primitive.bind(*functions, *operands, **params)
    return results if node.primitive.multiple_results else [results]
