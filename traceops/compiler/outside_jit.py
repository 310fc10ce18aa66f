# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Programs that run outside jit: compiled once for all calls that compute the same.

A call outside jit is traced as often as ever, for only its trace tells what it computes now. Of
two calls with equal programs the second runs what was compiled for the first.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from traceops.compiler.jaxpr import CALLS, named

__all__ = ['Programs', 'key_of']

_MOST = 8                       # programs that are kept, the last ones used
_SMALL = 1024                   # elements of a constant that is compared by its values


class Programs:
    """The compiled programs of one owner; they are not copied with it, and end with it."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[Any, Callable[..., Any]] = OrderedDict()

    def __deepcopy__(self, memo: Any) -> Programs:
        return Programs()

    def __reduce__(self) -> Any:
        return Programs, ()

    def call(self, function: Callable[[], Any]) -> Any:
        """``function()``, a pure one of arrays that it holds, as one program."""
        trees = []

        def leaves() -> list[Any]:
            flat, tree = jax.tree.flatten(function())
            trees.append(tree)
            return flat

        results = self.evaluate(jax.make_jaxpr(leaves)())
        return trees[-1].unflatten(results)

    def evaluate(self, closed: ClosedJaxpr, *operands: Any) -> list[Any]:
        """The results of a program; compiled, unless it is part of another or has effects."""
        jaxpr, given = closed.jaxpr, (*closed.consts, *operands)
        key = None if jaxpr.effects or any(isinstance(a, jax.core.Tracer) for a in given) \
            or jax.config.jax_disable_jit else key_of(jaxpr)  # type: ignore[attr-defined]
        if key is None:
            return jax.core.eval_jaxpr(jaxpr, closed.consts, *operands)
        # one step each, so that threads may share a learner
        compiled = self._compiled.pop(key, None) or jax.jit(
            jaxpr_as_fun(ClosedJaxpr(_without_consts(jaxpr), ())))
        self._compiled[key] = compiled
        if len(self._compiled) > _MOST:
            with contextlib.suppress(KeyError):
                self._compiled.popitem(last=False)
        return list(compiled(*given))


def _without_consts(jaxpr: Jaxpr) -> Jaxpr:
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


class _NeverEqualError(Exception):
    """A parameter of which nobody can tell whether another one does the same."""


def key_of(jaxpr: Jaxpr) -> Any:
    """Hashable, and equal for two programs only if they compute the same; ``None``: unknown."""
    try:
        with jax.transfer_guard('allow'):       # a constant is read, wherever it is
            key = _key_of(jaxpr)
        hash(key)
    except Exception:       # whatever a parameter may be, the program is run all the same
        return None
    return key


def _key_of(jaxpr: Jaxpr) -> Any:
    numbers: dict[Any, int] = {}

    def bind(variables: Sequence[Any]) -> tuple[Any, ...]:
        for v in variables:
            numbers[v] = len(numbers)
        return tuple(v.aval for v in variables)

    def read(v: Any) -> Any:
        return (*named(v), v.aval) if isinstance(v, Literal) else numbers[v]

    return (bind(jaxpr.constvars), bind(jaxpr.invars), tuple(
        (eqn.primitive, tuple(map(read, eqn.invars)), _params_of(eqn), bind(eqn.outvars))
        for eqn in jaxpr.eqns), tuple(map(read, jaxpr.outvars)))


def _params_of(eqn: Any) -> Any:
    inner = CALLS.get(eqn.primitive.name)
    if inner is not None and eqn.primitive.name.startswith('custom'):
        return _key_of_param(eqn.params[inner])     # how it is differentiated is not asked again
    return _key_of_param(eqn.params)


def _key_of_param(value: Any) -> Any:
    if isinstance(value, ClosedJaxpr):
        return _key_of(value.jaxpr), tuple(map(_key_of_const, value.consts))
    if isinstance(value, Jaxpr):
        return _key_of(value)
    if isinstance(value, dict):
        return tuple((name, _key_of_param(v)) for name, v in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_key_of_param, value))
    if isinstance(value, (bool, int, float, complex)):
        return type(value), repr(value)     # True, 1 and 1.0 are equal, and not the same
    if isinstance(value, functools.partial) or '<locals>' in getattr(value, '__qualname__', ''):
        raise _NeverEqualError       # a function that is made anew in the next trace
    return value                # an array has no hash


def _key_of_const(value: Any) -> Any:
    if isinstance(value, jax.core.Tracer) or value.size > _SMALL or not isinstance(
            value.dtype, np.dtype):
        raise _NeverEqualError
    return np.asarray(value).tobytes(), jax.typeof(value)
