# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Small questions asked of a jaxpr: what an output depends on, what it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

__all__ = ['backward_slice', 'depends_on', 'is_zero', 'restrict', 'value_if_constant']


def backward_slice(jaxpr: Jaxpr, outvars: Iterable[Any]) -> tuple[list[Any], set[Any]]:
    """The equations that ``outvars`` need, in order, and every variable they read."""
    needed = {v for v in outvars if not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1], needed


def restrict(closed: ClosedJaxpr, outputs: Sequence[int]) -> ClosedJaxpr:
    """``closed`` with only the outputs at these positions, and only the equations they need."""
    outvars = [closed.jaxpr.outvars[i] for i in outputs]
    eqns, _ = backward_slice(closed.jaxpr, outvars)
    return ClosedJaxpr(_rebuilt(closed.jaxpr, eqns, outvars), closed.consts)


def _rebuilt(jaxpr: Jaxpr, eqns: Sequence[Any], outvars: Sequence[Any]) -> Jaxpr:
    debug = jaxpr.debug_info
    with_results = getattr(debug, 'with_unknown_names', None)
    return Jaxpr(jaxpr.constvars, jaxpr.invars, outvars, eqns, jaxpr.effects,
                 with_results() if with_results is not None else debug)


def depends_on(closed: ClosedJaxpr, output: int, invars: Sequence[int]) -> bool:
    """Whether an output reads any of the inputs at these positions."""
    out = closed.jaxpr.outvars[output]
    if isinstance(out, Literal):
        return False
    _, needed = backward_slice(closed.jaxpr, [out])
    return any(closed.jaxpr.invars[i] in needed for i in invars)


def is_zero(closed: ClosedJaxpr, output: int) -> bool:
    """Whether an output is, by construction, an array of zeros (a gradient nobody produced)."""
    producers = {v: eqn for eqn in closed.jaxpr.eqns for v in eqn.outvars}
    var = closed.jaxpr.outvars[output]
    while not isinstance(var, Literal):
        eqn = producers.get(var)
        if eqn is None or eqn.primitive.name not in ('broadcast_in_dim', 'convert_element_type'):
            return False
        var = eqn.invars[0]
    return bool(np.all(np.asarray(var.val) == 0))


def value_if_constant(closed: ClosedJaxpr, output: int, known: dict[int, Any]) -> Any:
    """The value of an output when the inputs in ``known`` alone determine it, else ``None``.

    Parameters
    ----------
    closed : ClosedJaxpr
        The program.
    output : int
        Position of the output asked for.
    known : dict of int to array
        Values of some inputs, by position.

    Returns
    -------
    array or None
    """
    jaxpr = closed.jaxpr
    out = jaxpr.outvars[output]
    if isinstance(out, Literal):
        return out.val
    eqns, needed = backward_slice(jaxpr, [out])
    if any(v in needed for i, v in enumerate(jaxpr.invars) if i not in known):
        return None
    if any(isinstance(c, jax.core.Tracer) and v in needed
           for v, c in zip(jaxpr.constvars, closed.consts, strict=True)):
        return None
    sub = _rebuilt(jaxpr, eqns, [out])
    args = [known.get(i, np.zeros(v.aval.shape, v.aval.dtype)) if v in needed else 0
            for i, v in enumerate(jaxpr.invars)]
    with jax.ensure_compile_time_eval():
        return jax.core.eval_jaxpr(sub, closed.consts, *args)[0]
