# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The simulations of a window that a program runs, each by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from traceops.benchmarks.measure import pure
from traceops.ops import choice
from traceops.ops.simulate_window import SIMULATE_WINDOW, Simulation, watching

__all__ = ['alone', 'largest', 'simulations_of']


def simulations_of(fn: Callable[..., Any], *args: Any) -> list[Simulation]:
    """Those of a function of states that can be a kernel; it is traced, and not run."""
    found: list[Simulation] = []
    token = watching.set(found)
    try:
        pure(fn, *args)
    finally:
        watching.reset(token)
    return found


def largest(simulations: Sequence[Simulation]) -> Simulation | None:
    """The one of the network: others are of a readout, or of one of its lanes."""
    def size(one: Simulation) -> int:
        return sum(math.prod(state.aval.shape) for state in one.step.states)
    return max(simulations, key=size, default=None)


def alone(simulation: Simulation, backend: str = 'auto') -> Callable[..., Any]:
    """A function of its operands."""
    return jax.jit(functools.partial(
        SIMULATE_WINDOW.primitive.bind, request=backend, devices=choice.devices_needed(),
        step=simulation.step))
