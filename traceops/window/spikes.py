# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a value of a program is made of spikes: most of it is zero then, at most steps."""

from __future__ import annotations

from typing import Any

from jax.extend.core import Jaxpr, Literal

from traceops.window.jaxprs import CALLS

__all__ = ['has_spikes']

#: What leaves zeros where they are, and of which operands: the first, or any (``None``).
_KEEPS = {'concatenate': None, 'mul': None, 'select_n': None, 'div': 1, 'neg': 1, 'reshape': 1,
          'squeeze': 1, 'transpose': 1, 'slice': 1, 'broadcast_in_dim': 1, 'stop_gradient': 1,
          'convert_element_type': 1}


def has_spikes(jaxpr: Jaxpr, var: Any, step: str) -> bool:
    """Whether a part of ``var`` is spikes, however scaled, by what made it.

    Spikes are results of the primitive ``step`` (of surrogate gradients), and comparisons as
    numbers; what enters the program is not known to be any.
    """
    if isinstance(var, Literal):
        return False
    eqn = next((e for e in jaxpr.eqns if var in e.outvars), None)
    if eqn is None:
        return False
    name = eqn.primitive.name
    if name == step or name == 'convert_element_type' and eqn.invars[0].aval.dtype == bool:
        return True
    if name in CALLS:
        return _of_call(jaxpr, eqn, var, step)
    return name in _KEEPS and any(
        has_spikes(jaxpr, v, step) for v in eqn.invars[:_KEEPS[name]])


def _of_call(jaxpr: Jaxpr, eqn: Any, var: Any, step: str) -> bool:
    """Inside of the program that is called, else among what it is given."""
    inner = eqn.params[CALLS[eqn.primitive.name]].jaxpr
    result = inner.outvars[eqn.outvars.index(var)]
    if has_spikes(inner, result, step):
        return True
    passed = [a for a, v in zip(eqn.invars, inner.invars, strict=True) if v is result]
    return any(has_spikes(jaxpr, a, step) for a in passed)
