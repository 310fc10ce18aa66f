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

__all__ = ['every_step', 'flatten', 'join', 'join_rows', 'joined_structs', 'labels', 'once_axes',
           'once_bits', 'unflatten']


def join(states: Any) -> Any:
    """S arrays to ``[..., S]``; an array is left as it is."""
    return jnp.stack(states, -1) if isinstance(states, Sequence) else jnp.asarray(states)


def join_rows(rows: Any) -> Any:
    """S rows of S arrays to ``[..., S, S]``; an array is left as it is."""
    if not isinstance(rows, Sequence):
        return jnp.asarray(rows)
    return jnp.stack([join(row) for row in rows], -2)


def every_step(operands: Sequence[Any], steps: int) -> list[Any]:
    """Operands ``[T, ...]``: one that came once is repeated."""
    return [jnp.broadcast_to(a, (steps, *a.shape[1:])) for a in operands]


def once_axes(axes: Sequence[tuple[str, ...]], operands: Sequence[Any],
              steps: int) -> list[tuple[str, ...]]:
    """Names of the axes where what is the same at every step may come once, ``[1, ...]``."""
    return [('once', *names[1:]) if names[:1] == ('t',) and a.shape[:1] == (1,) != (steps,)
            else names for names, a in zip(axes, operands, strict=True)]


def once_bits(operands: Sequence[Any], steps: int, states: int, signals: int) -> int:
    """A bit for each operand that came once, in the order of a kernel: the Jacobian's first.

    Here the ``signals`` arrays of a signal come before it.
    """
    once = [a.shape[0] != steps for a in operands]
    end = signals + states ** 2
    return sum(bit << i for i, bit in enumerate(once[signals:end] + once[:signals] + once[end:]))


def flatten(arguments: Sequence[Any], kinds: str) -> tuple[list[Any], int]:
    """Operands of a primitive, and the number of separate states (0: trailing axes).

    Parameters
    ----------
    arguments : sequence
        Arrays, or states.
    kinds : str
        One letter an argument: ``v`` has S states, ``m`` S x S.
    """
    if not any(isinstance(a, Sequence) for a in arguments):
        return [jnp.asarray(a) for a in arguments], 0
    flat: list[Any] = []
    for argument, kind in zip(arguments, kinds, strict=True):
        rows = split_rows(argument) if kind == 'm' else (split(argument),)
        flat.extend(jnp.asarray(a) for row in rows for a in row)
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
