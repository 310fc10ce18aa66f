# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""States as a trailing axis, or as one array a state: the references take either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

__all__ = ['split', 'split_rows', 'steps_of', 'time_varying']


def split(array: Any) -> tuple[Any, ...]:
    """``[..., S]`` to S arrays; what is separate already stays so."""
    if isinstance(array, Sequence):
        return tuple(array)
    return tuple(array[..., s] for s in range(array.shape[-1]))


def split_rows(array: Any) -> tuple[tuple[Any, ...], ...]:
    """``[..., S, S]`` to S rows of S arrays."""
    if isinstance(array, Sequence):
        return tuple(map(tuple, array))
    return tuple(split(array[..., s, :]) for s in range(array.shape[-2]))


def steps_of(tree: Any) -> int:
    """T of arrays ``[T, ...]``, of which some, the same at every step, may be ``[1, ...]``."""
    return max((a.shape[0] for a in jax.tree.leaves(tree)), default=0)


def time_varying(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays that a scan over time slices, and ``slices -> one step of tree``.

    Loop-invariant arrays, ``[1, ...]``, are not sliced.
    """
    steps = steps_of(tree)
    leaves, structure = jax.tree.flatten(tree)
    varying = [a for a in leaves if a.shape[0] == steps]

    def step(slices: Sequence[Any]) -> Any:
        rest = iter(slices)
        return structure.unflatten([next(rest) if a.shape[0] == steps else a[0] for a in leaves])
    return varying, step
