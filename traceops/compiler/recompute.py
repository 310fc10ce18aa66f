# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What is known of all steps of a window before recomputation, and what that gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

__all__ = ['Recomputed', 'WindowValues']


@dataclasses.dataclass(frozen=True)
class WindowValues:
    """What is known of all steps before the recomputation.

    Attributes
    ----------
    stacks : dict of variables to arrays, ``[T, ...]``
        Slices, what was residuals, downstream states; and of what is carried, what entered a step.
    earlier : dict of variables to pairs of arrays
        Of what entered: the array of which it is the step before, and what entered the first.
    last : dict of int to array
        Carried outputs that are not in the core, after the last step.
    """

    stacks: dict[Any, Any]
    earlier: dict[Any, tuple[Any, Any]]
    last: dict[int, Any]

    def enter(self, left: dict[Any, Any], first: dict[Any, Any]) -> None:
        """Add what entered the steps: what had ``left`` the one before, or came ``first``."""
        for v_in, v_out in left.items():
            after, start = (a.astype(v_in.aval.dtype) for a in (self.stacks[v_out], first[v_in]))
            self.earlier[v_in] = after, start
            self.stacks[v_in] = jnp.concatenate([start[None], after[:-1]])


@dataclasses.dataclass(frozen=True)
class Recomputed:
    """What :meth:`StepPartition.recompute` gives.

    Attributes
    ----------
    stacked, sums : list of arrays
        Those of the stacked outputs that are not had later, ``[T, ...]``, and the summed ones.
    slices, earlier : list
        What ``later`` is called with a step of: arrays ``[T, ...]``, then pairs of one that is
        wanted a step earlier and of what comes before its first.
    later : callable
        ``slices of one step -> the outputs had later``.
    """

    stacked: list[Any]
    sums: list[Any]
    slices: list[Any]
    earlier: list[tuple[Any, Any]]
    later: Callable[[Sequence[Any]], list[Any]]

    def backward(self, digest: Callable[[Any, list[Any]], Any], carry: Any, steps: int) -> Any:
        """``digest(carry, outputs had later)`` from the last step to the first, as by a scan."""
        def step(carry: Any, given: Any) -> Any:
            t, slices = given
            # read where it is: an array of the steps before would be another to write and read
            before = [jnp.where(t == 0, first, lax.dynamic_index_in_dim(
                after, jnp.maximum(t - 1, 0), keepdims=False)) for after, first in self.earlier]
            return digest(carry, self.later([*slices, *before]))

        return lax.scan(step, carry, (jnp.arange(steps), self.slices), reverse=True)
