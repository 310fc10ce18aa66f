# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""States that no neuron feeds, computed before the simulation: random keys, counters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from traceops.compiler.jaxpr import backward_slice, interpreted, part
from traceops.kernels.simulate_window.step import Step

__all__ = ['Chained', 'chained']


@dataclasses.dataclass(frozen=True)
class Chained:
    """A step whose chains run by themselves.

    Attributes
    ----------
    step : Step
        The rest, to which the chains before each step are slices, the last of them.
    chains : tuple of int
        Which of the states of the whole step they are.
    """

    whole: Step
    step: Step
    chains: tuple[int, ...]

    def advance(self, constants: Any, slices: Any, states: Any) -> tuple[list[Any], list[Any]]:
        """One step of the chains alone: after it, and (kept) before it."""
        jaxpr = self.whole.closed.jaxpr
        ends = self.whole.constants + self.whole.slices
        enter = [*jaxpr.invars[:ends], *(self.whole.states[i] for i in self.chains)]
        leave = [self.whole.after[i] for i in self.chains]
        eqns, _ = backward_slice(jaxpr, leave)
        after = part(self.whole.closed, enter, leave, eqns)(*constants, *slices, *states)
        return after, list(states)

    def split(self, states: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Of all states, those of the chains, and the others."""
        return ([states[i] for i in self.chains],
                [a for i, a in enumerate(states) if i not in self.chains])

    def joined(self, chains: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """All states."""
        rest, own = iter(others), dict(zip(self.chains, chains, strict=True))
        return [own[i] if i in own else next(rest) for i in range(len(self.whole.states))]


def chained(step: Step) -> Chained | None:
    """The step with its chains separate; nothing where it has none.

    A chain is a state that is no float32, of which no step reads more than chains, slices and
    constants.
    """
    if step.closed.jaxpr.effects or all(v.aval.dtype == np.float32 for v in step.states):
        return None
    step = _without_barriers(step)
    jaxpr, states = step.closed.jaxpr, step.states
    others = {v for v in states if v.aval.dtype == np.float32}
    found = [i for i, v in enumerate(states) if v not in others]
    while True:
        kept = [i for i in found if isinstance(step.after[i], Literal) or not others & {
            step.after[i], *backward_slice(jaxpr, [step.after[i]])[1]}]
        if kept == found:
            break
        others |= {states[i] for i in found if i not in kept}
        found = kept
    if not found or len(found) == len(states):
        return None
    ends = step.constants + step.slices
    invars = [*jaxpr.invars[:ends], *(states[i] for i in found),
              *(v for i, v in enumerate(states) if i not in found)]
    outvars = [*(v for i, v in enumerate(step.after) if i not in found), *step.kept]
    eqns, _ = backward_slice(jaxpr, outvars)
    rest = jaxpr.replace(invars=invars, outvars=outvars, eqns=eqns,
                         debug_info=jaxpr.debug_info.with_unknown_names())
    return Chained(step, dataclasses.replace(
        step, closed=ClosedJaxpr(rest, step.closed.consts), slices=step.slices + len(found),
        said=[]), tuple(found))


def _without_barriers(step: Step) -> Step:
    """The same values: a barrier makes one equation of a chain and of what neurons do."""
    jaxpr = step.closed.jaxpr

    def run(*inputs: Any) -> list[Any]:
        return interpreted(jaxpr, step.closed.consts, inputs, jaxpr.eqns, lambda eqn, read: list(
            map(read, eqn.invars)) if eqn.primitive.name == 'optimization_barrier' else None)
    closed = jax.make_jaxpr(run)(*(
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars))
    return dataclasses.replace(step, closed=closed)
