# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The simulation of a window: the definition of the operation, in plain JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ['simulate_window']


def simulate_window(step: Callable[..., Any], constants: Sequence[Any], slices: Sequence[Any],
                    states: Sequence[Any], unroll: int = 1) -> tuple[list[Any], list[Any]]:
    """Run a step over time.

    Parameters
    ----------
    step : callable
        ``(constants, slices of one step, states) -> (states, what is kept)``, lists.
    constants : sequence of arrays
        The same at every step.
    slices : sequence of arrays, ``[T, ...]``
        What is different at each.
    states : sequence of arrays
        Before the first.
    unroll : int
        Steps in an iteration of the loop.

    Returns
    -------
    states : list of arrays
        After the last step.
    kept : list of arrays, ``[T, ...]``
        What is kept of each.
    """
    def body(before: Any, now: Any) -> Any:
        after, kept = step(constants, now, before)
        # a weak type would not close the loop
        return [jnp.asarray(a, b.dtype) for a, b in zip(after, before, strict=True)], kept

    after, kept = jax.lax.scan(body, list(states), list(slices), unroll=unroll)
    return after, kept
