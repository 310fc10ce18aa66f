# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a value of a program is made of spikes, and therefore mostly zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from traceops.compiler.jaxpr import CALLS, producers

__all__ = ['has_spikes']

#: Primitives that keep zeros in place, and of which operands: the first, or any (``None``).
_KEEPS = {'concatenate': None, 'mul': None, 'select_n': None, 'div': 1, 'neg': 1, 'reshape': 1,
          'squeeze': 1, 'transpose': 1, 'slice': 1, 'broadcast_in_dim': 1, 'stop_gradient': 1,
          'convert_element_type': 1}

#: Primitives that broadcast or convert a scalar.
_REPEATS = frozenset(('broadcast_in_dim', 'convert_element_type', 'reshape'))

_NONE: Mapping[Any, float] = {}


def has_spikes(jaxpr: Jaxpr, var: Any, step: str, numbers: Mapping[Any, float] = _NONE) -> bool:
    """Whether a part of ``var`` is spikes, possibly scaled, judged by the equations that made it.

    Spikes are results of the primitive ``step`` (of surrogate gradients), comparisons as numbers,
    and choices between numbers of which one is zero; what enters the program is not known to be
    any. ``numbers``: inputs of the program that are known to be one.
    """
    if isinstance(var, Literal):
        return False
    eqn = producers(jaxpr).get(var)
    if eqn is None:
        return False
    name = eqn.primitive.name
    if name == step or name == 'convert_element_type' and eqn.invars[0].aval.dtype == bool:
        return True
    if name == 'select_n':
        chosen = [_number(jaxpr, v, numbers) for v in eqn.invars[1:]]
        if 0. in chosen and None not in chosen:
            return True
    if name in CALLS:
        return _of_call(jaxpr, eqn, var, step, numbers)
    return name in _KEEPS and any(
        has_spikes(jaxpr, v, step, numbers) for v in eqn.invars[:_KEEPS[name]])


def _of_call(jaxpr: Jaxpr, eqn: Any, var: Any, step: str, numbers: Mapping[Any, float]) -> bool:
    """Inside of the program that is called, else among what it is given."""
    inner = eqn.params[CALLS[eqn.primitive.name]].jaxpr
    result = inner.outvars[eqn.outvars.index(var)]
    given = {v: _number(jaxpr, a, numbers)
             for a, v in zip(eqn.invars, inner.invars, strict=True)}
    if has_spikes(inner, result, step, {v: n for v, n in given.items() if n is not None}):
        return True
    passed = [a for a, v in zip(eqn.invars, inner.invars, strict=True) if v is result]
    return any(has_spikes(jaxpr, a, step, numbers) for a in passed)


def _number(jaxpr: Jaxpr, var: Any, numbers: Mapping[Any, float]) -> float | None:
    """The number that a value is, or is everywhere."""
    if isinstance(var, Literal):
        real = not jnp.issubdtype(var.aval.dtype, jnp.complexfloating)
        return float(var.val) if real and var.aval.shape == () else None
    if var in numbers:
        return numbers[var]
    eqn = producers(jaxpr).get(var)
    if eqn is None or eqn.primitive.name not in _REPEATS:
        return None
    return _number(jaxpr, eqn.invars[0], numbers)
