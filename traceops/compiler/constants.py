# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What of a step is expensive and the same at every step: computed once, an input from then on.

Once a call; or once, while the step is traced, where it follows from arrays that the step closes
over (the derivative through frozen synapses).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from traceops.compiler.jaxpr import backward_slice, is_pure, part, reached, with_inputs

__all__ = ['taken_out']


def taken_out(closed: ClosedJaxpr, varying: Iterable[int], is_expensive: Callable[[Any], bool],
              ) -> tuple[ClosedJaxpr, Callable[..., list[Any]] | None]:
    """The step with such values as further inputs, and what computes them from the first inputs.

    XLA moves what is cheap out of a loop over windows, but neither calls of a library nor what
    is large.

    Parameters
    ----------
    closed : ClosedJaxpr
        The step without nested calls.
    varying : iterable of int
        Inputs that differ from step to step.
    is_expensive : callable
        Whether the results of an equation are to be kept.

    Returns
    -------
    ClosedJaxpr, callable or None
        ``None``: there is nothing to take out.
    """
    jaxpr, varying = closed.jaxpr, set(varying)
    varies = reached(jaxpr.eqns, [
        *(jaxpr.invars[i] for i in varying),
        *(v for e in jaxpr.eqns if not is_pure(e) for v in e.outvars)])
    same = {v for e in jaxpr.eqns if is_pure(e) and is_expensive(e)
            and not e.primitive.name.startswith(('random_', 'rng_'))
            and varies.isdisjoint(e.outvars) for v in e.outvars}
    eqns, needed = backward_slice(jaxpr, jaxpr.outvars, given=same, effects=True)
    once = [v for e in jaxpr.eqns for v in e.outvars if v in same and v in needed]
    if not once:
        return closed, None
    constant = [v for i, v in enumerate(jaxpr.invars) if i not in varying]
    before, read = backward_slice(jaxpr, once)
    compute = part(closed, constant, once, before)
    now = None
    if read.isdisjoint(constant):
        now = _now(compute, [None] * len(constant), [
            a for v, a in zip(jaxpr.constvars, closed.consts, strict=True) if v in read])
    return with_inputs(closed, once, eqns), lambda *inputs: now or compute(
        *(a for i, a in enumerate(inputs) if i not in varying))


def _now(compute: Callable[..., list[Any]], inputs: list[Any], closed_over: list[Any],
         ) -> list[Any] | None:
    """The values, where all that they follow from is known."""
    if any(isinstance(a, jax.core.Tracer) for a in closed_over):
        return None
    try:        # of arrays that are there: nothing is moved that the program would not move
        with jax.ensure_compile_time_eval(), jax.transfer_guard('allow'):
            return jax.block_until_ready(compute(*inputs))
    except Exception:       # what has no value now (in a mesh of another call, say) has one later
        return None
