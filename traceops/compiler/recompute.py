# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Values of all steps of a window: the inputs of the recomputation, and its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

__all__ = ['Recomputed', 'WindowValues']


@dataclasses.dataclass(frozen=True)
class WindowValues:
    """Inputs of the recomputation, stacked over steps.

    Attributes
    ----------
    stacks : dict of variables to arrays, ``[T, ...]``
        Slices, residuals, downstream states, and carried values before each step.
    earlier : dict of variables to pairs of arrays
        Of carried values before a step: the stack after each step, and the first value.
    last : dict of int to array
        Carried outputs that are not in the core, after the last step.
    """

    stacks: dict[Any, Any]
    earlier: dict[Any, tuple[Any, Any]]
    last: dict[int, Any]

    def enter(self, left: dict[Any, Any], first: dict[Any, Any]) -> None:
        """Add carried values before each step: after the step before, or ``first``."""
        for v_in, v_out in left.items():
            after, start = (a.astype(v_in.aval.dtype) for a in (self.stacks[v_out], first[v_in]))
            self.earlier[v_in] = after, start
            self.stacks[v_in] = jnp.concatenate([start[None], after[:-1]])


@dataclasses.dataclass(frozen=True)
class Recomputed:
    """Results of :meth:`StepPartition.recompute`.

    Attributes
    ----------
    stacked, sums : list of arrays
        The stacked outputs, ``[T, ...]``, other than the later ones; and the summed ones.
    slices, earlier : list
        Operands of ``later``: arrays ``[T, ...]`` that are sliced, then pairs of an array that is
        read one step earlier and the value before its first.
    later : callable
        ``slices of one step -> the later outputs``.
    """

    stacked: list[Any]
    sums: list[Any]
    slices: list[Any]
    earlier: list[tuple[Any, Any]]
    later: Callable[[Sequence[Any]], list[Any]]

    def backward(self, digest: Callable[[Any, list[Any]], Any], carry: Any, steps: int) -> Any:
        """Scan ``digest(carry, later outputs)`` from the last step to the first."""
        def step(carry: Any, given: Any) -> Any:
            t, slices = given
            # indexed in place: a shifted copy would be one more array to write and read
            before = [jnp.where(t == 0, first, lax.dynamic_index_in_dim(
                after, jnp.maximum(t - 1, 0), keepdims=False)) for after, first in self.earlier]
            return digest(carry, self.later([*slices, *before]))

        return lax.scan(step, carry, (jnp.arange(steps), self.slices), reverse=True)
