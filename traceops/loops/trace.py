# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A loop as jax has traced it, before anything of it has run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from traceops.compiler.jaxpr import interpreted
from traceops.loops.flat import Flat, Value, flatten

__all__ = ['TracedCall', 'TracedLoop']


class TracedLoop:
    """The equation of a loop, ``(constants, carry, slices) -> (carry, outputs)``.

    Attributes
    ----------
    steps, unroll : int
    reverse : bool
    carries : int
        How many of the body's inputs (after the constants) and outputs are carries.

    Parameters
    ----------
    equation : JaxprEqn
    values : mapping of variables to arrays
        What is known of its operands already.
    """

    def __init__(self, equation: Any, values: Mapping[Any, Any]) -> None:
        params = equation.params
        self.primitive, self.params = equation.primitive, params
        self.closed, self.steps = params['jaxpr'], params['length']
        self.reverse, self.unroll = params['reverse'], params['unroll']
        body, outer = self.closed.jaxpr, equation
        # a slice has an axis less than what it is cut from, an output than what it is stacked in
        self.carries = sum(map(_same_rank, body.outvars, outer.outvars))
        slices = len(body.invars) - sum(map(_same_rank, body.invars, outer.invars))
        self.constants = len(body.invars) - slices - self.carries
        self._given = [v.val if isinstance(v, Literal) else values.get(v)
                       for v in outer.invars[:self.constants]]

    @cached_property
    def flat(self) -> Flat:
        """The body."""
        return flatten(self.closed, self.constants)

    @cached_property
    def known(self) -> dict[Value, Any]:
        """Those of the constants of :attr:`flat` whose values are known."""
        return {v: a for v, a in zip(self.flat.constants, self._given, strict=True)
                if a is not None}

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Constants, carries and slices."""
        first, second = self.constants, self.constants + self.carries
        return list(operands[:first]), list(operands[first:second]), list(operands[second:])


def _number(literal: Any) -> Any:
    """A Python number as one, and not as jax's traces remember it, by a subclass with a dtype."""
    value = literal.val
    kinds = (bool, int, float, complex)
    kind = next((k for k in kinds if isinstance(value, k)), None)
    return value if kind is None or isinstance(value, np.generic) else kind(value)


def _same_rank(inside: Any, outside: Any) -> bool:
    return len(inside.aval.shape) == len(outside.aval.shape)


class TracedCall:
    """A call of ``jax.lax.scan``: all that it does to its arguments, and nothing done yet.

    The call is jax's own, of the user's own function: it is traced as often as ever, what jax
    remembers of it is remembered, and an error comes from where it always came from.

    Parameters
    ----------
    call : callable
        Without arguments.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._given: list[Any] = []     # what comes back as it is, of types that no program has

        def scan() -> list[Any]:
            leaves, self._tree = jax.tree.flatten(call())
            computed = [isinstance(a, jax.core.Tracer) for a in leaves]
            self._given = [None if c else a for a, c in zip(leaves, computed, strict=True)]
            return [a for a, c in zip(leaves, computed, strict=True) if c]

        self.closed = jax.make_jaxpr(scan)()
        loops = [e for e in self.closed.jaxpr.eqns if e.primitive.name == 'scan']
        self.equation: Any = loops[0] if len(loops) == 1 else None

    @property
    def values(self) -> dict[Any, Any]:
        """Variables of :attr:`closed` whose values are known."""
        return {v: a for v, a in zip(self.closed.jaxpr.constvars, self.closed.consts, strict=True)
                if not isinstance(a, jax.core.Tracer)}

    def run(self, loop: Callable[..., Sequence[Any]] | None = None) -> Any:
        """The result; of ``loop`` in the place of the original, ``(*operands) -> results``."""
        def instead(eqn: Any, read: Callable[[Any], Any]) -> Sequence[Any] | None:
            if eqn is not self.equation:
                return None
            if loop is not None:
                return loop(*map(read, eqn.invars))
            # bound as jax binds it: in another context, or of other operands, it would be a
            # program of its own, and the next call of the same loop would compile again
            params: dict[str, Any] = eqn.primitive.get_bind_params(eqn.params)
            operands = [_number(v) if isinstance(v, Literal) else read(v) for v in eqn.invars]
            return list(eqn.primitive.bind(*operands, **params))

        jaxpr, consts = self.closed.jaxpr, self.closed.consts
        computed = iter(
            jax.core.eval_jaxpr(jaxpr, consts) if self.equation is None else
            interpreted(jaxpr, consts, (), jaxpr.eqns, instead))
        return self._tree.unflatten(
            [next(computed) if a is None else a for a in self._given])
