# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Types of values: a dtype, and whether it is weak (gives way to that of another operand)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from traceops.reasons import Reason

__all__ = ['CarryTypeError', 'typed']


class CarryTypeError(TypeError):
    """A value that is carried from step to step changes its type on the way."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def typed(value: Any, like: Any) -> Any:
    """The value in the dtype of ``like``, weak where that is.

    Parameters
    ----------
    value : array or number
    like : array or aval
        Has a ``dtype``; weak where its ``weak_type`` is true.
    """
    weak = bool(getattr(like, 'weak_type', False))
    value = jnp.asarray(value)
    if value.dtype == like.dtype and bool(getattr(value, 'weak_type', False)) == weak:
        return value
    return jax.lax.convert_element_type_p.bind(
        value, new_dtype=like.dtype, weak_type=weak, sharding=None)
