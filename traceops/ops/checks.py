# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of operands; every message names the argument."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

__all__ = ['floating', 'positions', 'promoted', 'ranked', 'same_dtype']


def ranked(op: str, argument: str, operand: Any, axes: str, rank: int) -> None:
    """The operand has this rank."""
    if operand.ndim != rank:
        raise ValueError(f'{op}: `{argument}` has shape {operand.shape}, which has '
                         f'{operand.ndim} axes; it is {axes}, which has {rank}.')


def positions(op: str, argument: str, operand: Any, axes: str, fixed: int) -> tuple[str, ...]:
    """Names of the axes of positions (batch and hidden shape): all but ``fixed`` axes."""
    if operand.ndim < fixed:
        raise ValueError(f'{op}: `{argument}` has shape {operand.shape}; it is {axes}, which has '
                         f'at least {fixed} axes.')
    return tuple(f'p{i}' for i in range(operand.ndim - fixed))


def floating(op: str, arguments: Sequence[str], operands: Sequence[Any]) -> None:
    """Every operand is of a real floating dtype."""
    for argument, a in zip(arguments, operands, strict=True):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise TypeError(f'{op}: `{argument}` is {a.dtype}; it takes a real floating dtype, '
                            f'e.g. {argument}.astype(jnp.float32).')


def same_dtype(op: str, arguments: Sequence[str], operands: Sequence[Any]) -> Any:
    """The one dtype that every operand has."""
    floating(op, arguments, operands)
    first = operands[0].dtype
    for argument, a in zip(arguments, operands, strict=True):
        if a.dtype != first:
            raise TypeError(f'{op}: `{argument}` is {a.dtype} and `{arguments[0]}` is {first}; '
                            'all operands have one dtype.')
    return first


def promoted(op: str, arguments: Sequence[str], operands: Sequence[Any]) -> list[Any]:
    """Operands of several floating dtypes in the one that a product of them has."""
    floating(op, arguments[:len(operands)], operands)
    dtype = functools.reduce(jnp.promote_types, (a.dtype for a in operands))
    return [a.astype(dtype) for a in operands]
