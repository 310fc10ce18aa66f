# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""One step of a simulation as a program that can be compared, hashed and passed to jax."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from traceops.compiler.jaxpr import backward_slice, named

__all__ = ['Step', 'UnsupportedError', 'trace_step']


class UnsupportedError(Exception):
    """Why a step cannot be a kernel."""


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """``(constants, slices, states) -> (states, kept)``, equal to another by its text.

    Attributes
    ----------
    closed : ClosedJaxpr
        Without constants of its own.
    constants, slices : int
        How many of its inputs are; the others are states.
    unroll : int
        Steps in an iteration of the loop that the reference is.
    spike : str
        The primitive that makes spikes (see :mod:`traceops.compiler.spikes`).
    said : list of str
        Why lanes over it keep the loop, where they do: noted when it is mapped, for who asks.
    """

    closed: ClosedJaxpr
    constants: int
    slices: int
    unroll: int
    spike: str
    said: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, constants: Any, slices: Any, states: Any) -> tuple[list[Any], list[Any]]:
        out = jax.core.eval_jaxpr(self.closed.jaxpr, self.closed.consts,
                                  *constants, *slices, *states)
        return out[:len(self.states)], out[len(self.states):]

    @property
    def states(self) -> list[Any]:
        """Variables: of the states before the step."""
        return list(self.closed.jaxpr.invars[self.constants + self.slices:])

    @property
    def after(self) -> list[Any]:
        """Of the states after it."""
        return list(self.closed.jaxpr.outvars[:len(self.states)])

    @property
    def kept(self) -> list[Any]:
        """Of what is kept of it."""
        return list(self.closed.jaxpr.outvars[len(self.states):])

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Constants, slices and states."""
        end = self.constants + self.slices
        return (list(operands[:self.constants]), list(operands[self.constants:end]),
                list(operands[end:]))

    @functools.cached_property
    def _text(self) -> tuple[Any, ...]:
        jaxpr = self.closed.jaxpr
        numbers = tuple(named(v) for e in jaxpr.eqns for v in (*e.invars, *jaxpr.outvars)
                        if isinstance(v, Literal))
        return str(jaxpr), numbers, self.constants, self.slices, self.unroll, self.spike

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Step) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return f'Step({len(self.closed.jaxpr.eqns)} equations, {len(self.states)} states)'


def trace_step(step: Callable[..., Any], constants: Sequence[Any], slices: Sequence[Any],
               states: Sequence[Any], unroll: int, spike: str) -> tuple[Step, list[Any]]:
    """The step as a :class:`Step`, and its operands: those that it reads.

    Parameters
    ----------
    step : callable
        ``(constants, slices of one step, states) -> (states, kept)``, lists.
    constants, slices, states : sequence of arrays
        As in :func:`traceops.ops.simulate_window`.
    unroll, spike
        As in :class:`Step`.
    """
    counts = np.cumsum([len(constants), len(slices)])

    def flat(*inputs: Any) -> list[Any]:
        after, kept = step(*(list(a) for a in (
            inputs[:counts[0]], inputs[counts[0]:counts[1]], inputs[counts[1]:])))
        return [*after, *kept]

    def struct(a: Any, axis: int = 0) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape[axis:], a.dtype)

    closed = jax.make_jaxpr(flat)(*map(struct, constants), *(struct(a, 1) for a in slices),
                                  *map(struct, states))
    jaxpr = closed.jaxpr
    eqns, read = backward_slice(jaxpr, jaxpr.outvars, effects=True)
    read |= set(jaxpr.invars[counts[0]:counts[0] + 1])      # some slice: it says how many steps
    named_constants = [*zip(jaxpr.constvars, closed.consts, strict=True),
                       *zip(jaxpr.invars, constants, strict=False)]
    fixed = [(v, a) for v, a in named_constants if v in read]
    moving = [(v, a) for v, a in zip(jaxpr.invars[counts[0]:counts[1]], slices, strict=True)
              if v in read]
    before = list(jaxpr.invars[counts[1]:])
    pruned = Jaxpr((), [*(v for v, _ in (*fixed, *moving)), *before], list(jaxpr.outvars), eqns,
                   jaxpr.effects, jaxpr.debug_info.with_unknown_names())
    found = Step(ClosedJaxpr(pruned, ()), len(fixed), len(moving), unroll, spike)
    return found, [*(a for _, a in (*fixed, *moving)), *states]
