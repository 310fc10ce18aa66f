# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""States of a position: a trailing axis, or one array a state.

The engine keeps one array a state, which a CPU vectorises; a kernel wants them side by side.
Operations take either, and each reference computes on what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from traceops.kernels.layout import split, split_rows

__all__ = ['flatten', 'join', 'join_rows', 'joined_structs', 'labels', 'unflatten']


def join(states: Any) -> Any:
    """S arrays to ``[..., S]``; an array is left as it is."""
    return jnp.stack(states, -1) if isinstance(states, Sequence) else jnp.asarray(states)


def join_rows(rows: Any) -> Any:
    """S rows of S arrays to ``[..., S, S]``; an array is left as it is."""
    if not isinstance(rows, Sequence):
        return jnp.asarray(rows)
    return jnp.stack([join(row) for row in rows], -2)


def flatten(arguments: Sequence[Any], kinds: str) -> tuple[list[Any], int]:
    """Operands of a primitive, and the number of separate states (0: trailing axes).

    Parameters
    ----------
    arguments : sequence
        Arrays, or states.
    kinds : str
        One letter an argument: ``v`` has S states, ``m`` S x S.

    A state may be a number, which takes the dtype of the arrays.
    """
    if not any(isinstance(a, Sequence) for a in arguments):
        return [jnp.asarray(a) for a in arguments], 0
    flat: list[Any] = []
    arrays = [a for a in jax.tree.leaves(arguments) if not isinstance(a, float)]
    for argument, kind in zip(arguments, kinds, strict=True):
        rows = split_rows(argument) if kind == 'm' else (split(argument),)
        flat.extend(jnp.asarray(a, arrays[0].dtype if isinstance(a, float) else None)
                    for row in rows for a in row)
    return flat, len(split(arguments[0]))


def unflatten(operands: Sequence[Any], kinds: str, states: int) -> list[Any]:
    """The arguments that :func:`flatten` was given."""
    if not states:
        return list(operands)
    rest, out = list(operands), []
    for kind in kinds:
        rows = []
        for _ in range(states if kind == 'm' else 1):
            rows.append(tuple(rest[:states]))
            rest = rest[states:]
        out.append(tuple(rows) if kind == 'm' else rows[0])
    return out


def labels(names: Sequence[str], kinds: str, states: int) -> list[str]:
    """Names of the operands, for messages."""
    if not states:
        return list(names)
    indices = [f'[{s}]' for s in range(states)]
    return [name + i + j for name, kind in zip(names, kinds, strict=True)
            for i in (indices if kind == 'm' else ('',)) for j in indices]


def joined_structs(operands: Sequence[Any], kinds: str, states: int) -> list[Any]:
    """Shapes of the arguments with trailing axes of states."""
    if not states:
        return list(operands)
    out, position = [], 0
    for kind in kinds:
        first = operands[position]
        out.append(jax.ShapeDtypeStruct(
            (*first.shape, *(states,) * (2 if kind == 'm' else 1)), first.dtype))
        position += states ** 2 if kind == 'm' else states
    return out
