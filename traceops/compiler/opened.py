# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Operations that stand for programs, written out."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxprs_in_params

from traceops.compiler.jaxpr import alone, interpreted
from traceops.compiler.types import typed

__all__ = ['opened']


def opened(closed: ClosedJaxpr, kind: Any) -> ClosedJaxpr:
    """The same program with what the primitives of a ``kind`` compute in their place.

    In programs within it too. What such a primitive says of being mapped or differentiated is for
    who maps the user's program: of how a window is computed it would say what is not so.

    Parameters
    ----------
    closed : ClosedJaxpr
    kind : type or None
        A subclass of ``Primitive``, of one result each; ``None``: nothing is written out.
    """
    if kind is None or not _any(closed.jaxpr, kind):
        return closed

    def program(*inputs: Any) -> list[Any]:
        def instead(eqn: Any, read: Any) -> list[Any] | None:
            if isinstance(eqn.primitive, kind):
                result = eqn.primitive.impl(*map(read, eqn.invars), **eqn.params)
                return [typed(result, eqn.outvars[0].aval)]
            if not any(_any(inner, kind) for inner in jaxprs_in_params(eqn.params)):
                return None
            return alone(closed.jaxpr, eqn.replace(params={
                name: _within(param, kind) for name, param in eqn.params.items()}), read)

        return interpreted(closed.jaxpr, closed.consts, inputs, closed.jaxpr.eqns, instead)

    return jax.make_jaxpr(program)(*(
        jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=getattr(a, 'weak_type', False))
        for a in closed.in_avals))


def _within(param: Any, kind: Any) -> Any:
    if isinstance(param, ClosedJaxpr):
        return opened(param, kind)
    if isinstance(param, (tuple, list)):
        return type(param)(_within(one, kind) for one in param)
    return param


def _any(jaxpr: Any, kind: Any) -> bool:
    return any(isinstance(eqn.primitive, kind) or any(
        _any(inner, kind) for inner in jaxprs_in_params(eqn.params)) for eqn in jaxpr.eqns)
