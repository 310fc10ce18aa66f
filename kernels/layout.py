# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""States as a trailing axis, or as one array a state: the references take either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ['split', 'split_rows']


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
