# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Operations that stand for programs, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxprs_in_params

from traceops.compiler.jaxpr import alone, interpreted
from traceops.compiler.types import typed

__all__ = ['opened']


def opened(closed: ClosedJaxpr, stands_for: Callable[[Any], bool] | None) -> ClosedJaxpr:
    """The same program with what some primitives compute in their place.

    In programs within it too. What such a primitive says of being mapped or differentiated is for
    who maps the user's program: of how a window is computed it would say what is not so. And what
    is written out is seen to be the same as what is computed beside it.

    Parameters
    ----------
    closed : ClosedJaxpr
    stands_for : callable or None
        Whether a primitive, of one result, stands for a program; ``None``: nothing is written out.
    """
    if stands_for is None or not _any(closed.jaxpr, stands_for):
        return closed

    def program(*inputs: Any) -> list[Any]:
        def instead(eqn: Any, read: Any) -> list[Any] | None:
            if stands_for(eqn.primitive):
                result = eqn.primitive.impl(*map(read, eqn.invars), **eqn.params)
                (result,) = result if eqn.primitive.multiple_results else (result,)
                return [typed(result, eqn.outvars[0].aval)]
            if not any(_any(inner, stands_for) for inner in jaxprs_in_params(eqn.params)):
                return None
            return alone(closed.jaxpr, eqn.replace(params={
                name: _within(param, stands_for) for name, param in eqn.params.items()}), read)

        return interpreted(closed.jaxpr, closed.consts, inputs, closed.jaxpr.eqns, instead)

    return jax.make_jaxpr(program)(*(
        jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=getattr(a, 'weak_type', False))
        for a in closed.in_avals))


def _within(param: Any, stands_for: Callable[[Any], bool]) -> Any:
    if isinstance(param, ClosedJaxpr):
        return opened(param, stands_for)
    if isinstance(param, (tuple, list)):
        return type(param)(_within(one, stands_for) for one in param)
    return param


def _any(jaxpr: Any, stands_for: Callable[[Any], bool]) -> bool:
    return any(stands_for(eqn.primitive) or any(
        _any(inner, stands_for) for inner in jaxprs_in_params(eqn.params)) for eqn in jaxpr.eqns)
