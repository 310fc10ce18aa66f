# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The form of the loops over time: a step at a time, or in two phases.

On a CPU the record of a step is used while it is in the cache; on a GPU launches are what costs,
and the loop only simulates. Which of the two a program has is chosen where it is lowered, as the
operations are: the device that jax has by default need not be the one that a program is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainstate
import jax

from traceops import ops
from traceops.compiler.types import typed
from traceops.host import upstream
from traceops.ops import choice

__all__ = ['UNROLL', 'EffectsError', 'OfStates', 'Simulator', 'at_once', 'by_form',
           'form_of_loops', 'forms_of', 'is_outside_jit', 'simulator_of']


class EffectsError(Exception):
    """A function has effects, which must stay where they are written."""


#: Steps in an iteration of a loop over time where launches dominate (`traceops programs` counts
#: them). Longer iterations save few more, and move more bytes to store residuals.
UNROLL = 5


def _is_open(settings: Any) -> bool:
    """Whether the platform decides: the settings do not, and programs for a GPU can be made."""
    return settings.two_phase is None and settings.backend != 'triton' and \
        choice.devices_needed() is not None


def at_once(settings: Any) -> bool:
    """Whether steps are in two phases here: where launches are what costs, or a kernel is asked
    for.
    """
    if settings.two_phase is not None:
        return bool(settings.two_phase)
    return jax.default_backend() != 'cpu' or settings.backend == 'triton'


def forms_of(settings: Any) -> tuple[bool, ...]:
    """Whether steps are in two phases: here; then elsewhere, where the platform decides."""
    here = at_once(settings)
    return (here, not here) if _is_open(settings) else (here,)


def is_outside_jit(given: Any) -> bool:
    """Whether what a program is called with are values."""
    return not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(given))


def by_form(settings: Any, run: Callable[[bool], Any]) -> Any:
    """``run(whether steps are in two phases)``: arrays, in the types of the form that is for here.

    Where the platform decides both forms are traced, and one is lowered.
    """
    here = at_once(settings)
    types: list[Any] = []
    if not _is_open(settings):
        return run(here)

    def branch(together: bool) -> Any:
        out = run(together)
        if together == here:
            types[:] = [jax.typeof(a) for a in jax.tree.leaves(out)]
        # strong, in both branches the same; a weak type is given back below
        return jax.tree.map(lambda a: typed(a, jax.ShapeDtypeStruct((), a.dtype)), out)

    out = jax.lax.platform_dependent(cpu=lambda: branch(False), default=lambda: branch(True))
    leaves, tree = jax.tree.flatten(out)
    return tree.unflatten(map(typed, leaves, types)) if types else out


class OfStates:
    """A function that reads and writes states, traced and not run; call it to run it.

    Raises
    ------
    EffectsError
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._program = brainstate.transform.StatefulFunction(function, name='traceops_steps')
        self._program.make_jaxpr()
        if self._program.get_jaxpr().effects:
            raise EffectsError
        written = {id(state) for state in self._program.get_write_states()}
        self._written = [s for s in self._program.get_states() if id(s) in written]

    def __call__(self) -> Any:
        states = self._program.get_states()
        values, out = self._program.jaxpr_call([state.value for state in states])
        after = {id(state): value for state, value in zip(states, values, strict=True)}
        for state in self._written:
            state.value = after[id(state)]
        return out

    def by_form(self, settings: Any, together: bool, other: Callable[[], Any]) -> Any:
        """This in one form (``together``), in the other what writes the same states."""
        def run(form: bool) -> Any:
            before = [state.value for state in self._written]
            try:
                out = self() if form == together else other()
                return out, [state.value for state in self._written]
            finally:
                for state, value in zip(self._written, before, strict=True):
                    state.value = value

        out, values = by_form(settings, run)
        for state, value in zip(self._written, values, strict=True):
            state.value = value
        return out


def form_of_loops(together: bool) -> dict[str, Any]:
    """What :func:`~traceops.compiler.program.trace_step` is told of the loops over time."""
    return {'cpu': not together, 'unroll': UNROLL if together else 1}


def simulator_of(settings: Any, together: bool) -> Simulator | None:
    """What runs the loops that only simulate, where steps are in two phases."""
    return Simulator(settings) if together else None


class Simulator:
    """Runs the loops that only simulate, and can tell how."""

    def __init__(self, settings: Any) -> None:
        self.backend = settings.backend
        self.last: ops.Simulation | None = None

    def __call__(self, step: Any, constants: Any, slices: Any, states: Any, unroll: int,
                 downstream: bool = False) -> Any:
        # who names the kernel means that of the network
        backend = 'auto' if downstream and self.backend == 'triton' else self.backend
        found = ops.Simulation(step, constants, slices, states, unroll=unroll,
                               spike=upstream.SPIKE, backend=backend)
        self.last = self.last if downstream else found
        return found.run()

    def describe(self) -> list[str]:
        """What ``explain`` says of the simulation of a window."""
        return [] if self.last is None else [f"the window's simulation: {self.last}"]
