# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A fast learner's single step, through the primitives of :mod:`traceops.window.step`."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax

from traceops.host import upstream
from traceops.window.step import GRADIENT, PREVIOUS, UPDATE, Step

__all__ = ['Steps', 'loops_are_watched', 'unwatched']

_unwatched: ContextVar[bool] = ContextVar('traceops_unwatched', default=False)
_made: weakref.WeakSet[Any] = weakref.WeakSet()


def loops_are_watched() -> bool:
    """Whether a loop that starts now may be one around a fast learner."""
    return not _unwatched.get() and len(_made) > 0


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Loops of this block are the project's own."""
    token = _unwatched.set(True)
    try:
        yield
    finally:
        _unwatched.reset(token)


class Steps:
    """The steps of one learner; ``update`` and ``solve`` are upstream's own methods, bound."""

    def __init__(self, learner: Any, update: Callable[..., Any], solve: Callable[..., Any],
                 previous: Callable[..., Any] | None) -> None:
        self.learner = learner
        self.paths = tuple(dict.fromkeys(
            path for relation in learner.graph.hidden_param_op_relations
            for path in relation.trainable_paths.values()))
        self._methods = {UPDATE: self._update, GRADIENT: self._gradient, PREVIOUS: self._previous}
        self._upstream_update, self._upstream_solve = update, solve
        self._upstream_previous = previous
        self._steps: dict[Any, Step] = {}
        _made.add(self)

    def update(self, trace: Any, h2w: Any, h2h: Any, weight_vals: Any) -> Any:
        """The trace after this step."""
        xs, fs = h2w
        return self._take(UPDATE, trace=trace, x=xs, f=fs, D=list(h2h),
                          weights=self._traced(weight_vals))

    def gradient(self, index: Any, trace: Any, signal: Any, weight_vals: Any) -> Any:
        """``{path: gradient}`` of the parameters with a trace; advances the filters, if any."""
        filters: dict[Any, Any] = getattr(self.learner, '_trace_filters', {})
        grads, values = self._take(
            GRADIENT, index=index, trace=trace, filters={k: s.value for k, s in filters.items()},
            signal=list(signal), weights=self._traced(weight_vals))
        for key, value in values.items():
            filters[key].value = value
        return grads

    def previous(self, index: Any, trace: Any, signal: Any, weight_vals: Any) -> Any:
        """``{path: gradient}`` that a signal on the previous hidden values makes."""
        filters: dict[Any, Any] = getattr(self.learner, '_trace_filters', {})
        return self._take(
            PREVIOUS, index=index, trace=trace, filters={k: s.value for k, s in filters.items()},
            signal=list(signal), weights=self._traced(weight_vals))

    def _traced(self, weight_vals: Any) -> Any:
        return {path: weight_vals[path] for path in self.paths}

    def _take(self, primitive: Any, **operands: Any) -> Any:
        key = (primitive, *(jax.tree.structure(value) for value in operands.values()))
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = Step(self.learner, self._methods[primitive], operands)
        return step.bind(primitive, **operands)

    # -- what the steps compute: upstream's own -----------------------------------------------

    def _update(self, trace: Any, x: Any, f: Any, D: Any, weights: Any) -> Any:
        return self._upstream_update(None, trace, (x, f), D, weights, False)

    def _gradient(self, index: Any, trace: Any, filters: Any, signal: Any, weights: Any) -> Any:
        if filters:
            kappa = self.learner.config.kappa
            filters = {k: jax.tree.map(lambda a, b: kappa * a + b, old, trace[k])
                       for k, old in filters.items()}
        return self._solve(index, {**trace, **filters} if filters else trace, signal,
                           weights), filters

    def _previous(self, index: Any, trace: Any, filters: Any, signal: Any, weights: Any) -> Any:
        if filters:
            return self._solve(index, {**trace, **filters}, signal, weights)
        return self._known(self._upstream_previous(  # type: ignore[misc]
            index, trace, signal, weights))

    def _solve(self, index: Any, trace: Any, signal: Any, weights: Any) -> Any:
        if isinstance(self.learner, upstream.ParamDimVjpAlgorithm):
            return upstream.solve_param_dim(
                self.learner, self.learner.graph.hidden_param_op_relations, trace, signal, weights)
        return self._known(self._upstream_solve(index, trace, signal, weights, {}, None))

    def _known(self, grads: Any) -> Any:
        return {path: grads[path] for path in self.paths if grads.get(path) is not None}
