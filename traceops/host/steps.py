# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A fast learner's single step, through the primitives of :mod:`traceops.engine.step`."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from traceops.engine.step import GRADIENT, PREVIOUS, UPDATE, Step
from traceops.host import upstream
from traceops.host.faults import meets_fusion_fault
from traceops.host.relations import RelationView, relation_views
from traceops.host.trace_pass import TracePass, pair_by_sample, pair_dense
from traceops.host.types import step_structs
from traceops.kernels.d_trace_window.launch import MAX_STATES
from traceops.ops import choice
from traceops.ops.primitive import OPERATIONS
from traceops.ops.report import why

__all__ = ['Steps', 'is_known_free', 'loops_are_watched', 'note_free', 'unwatched']

#: Bytes of one sample's trace from which samples are taken one by one on a CPU.
_LARGE = 2 ** 16

_unwatched: ContextVar[bool] = ContextVar('traceops_unwatched', default=False)
_made: weakref.WeakSet[Any] = weakref.WeakSet()
_free: dict[int, weakref.ref[Any]] = {}


def loops_are_watched() -> bool:
    """Whether a loop that starts now may be one around a fast learner."""
    return not _unwatched.get() and len(_made) > 0


def is_known_free(body: Any) -> bool:
    """Whether a loop with this very body was traced, since a learner was last made, and had no
    step in it. What jax has traced of a function it does not trace again either.
    """
    ref = _free.get(id(body))
    return ref is not None and ref() is body


def note_free(body: Any) -> None:
    """Remember that a loop with this body has no step in it, as long as the body lives."""
    key = id(body)
    with contextlib.suppress(TypeError):        # not everything can be referred to weakly
        _free[key] = weakref.ref(body, lambda _: _free.pop(key, None))


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Loops of this block are the project's own."""
    token = _unwatched.set(True)
    try:
        yield
    finally:
        _unwatched.reset(token)


def _served(request: str, calls: list[list[Any]], place: choice.Place) -> bool:
    """Whether the kernel of the trace update takes every one of these calls."""
    return all(choice.decide(OPERATIONS['d_trace_window'], structs, {'gradient': 'none'},
                             request, place).backend == 'triton' for structs in calls)


class Steps:
    """The steps of one learner; ``update`` and ``solve`` are upstream's own methods, bound."""

    def __init__(self, learner: Any, update: Callable[..., Any], solve: Callable[..., Any],
                 previous: Callable[..., Any] | None) -> None:
        self.learner, self.keys = learner, learner._recorder.keys
        self.paths = tuple(dict.fromkeys(
            path for relation in learner.graph.hidden_param_op_relations
            for path in relation.trainable_paths.values()))
        self._methods = {UPDATE: self._update, GRADIENT: self._gradient, PREVIOUS: self._previous}
        self._fused = {UPDATE: self._fused_update, GRADIENT: self._fused_gradient}
        self._by_sample = {GRADIENT: self._gradient_by_sample, PREVIOUS: self._previous_by_sample}
        self._upstream_update, self._upstream_solve = update, solve
        self._upstream_previous = previous
        self.start, self.operands = step_structs(learner)
        self._functions: dict[Any, Any] = {}
        self._steps: dict[Any, Step] = {}
        _made.add(self)
        _free.clear()

    def update(self, trace: Any, h2w: Any, h2h: Any, weight_vals: Any) -> Any:
        """The trace after this step."""
        trace, (xs, fs) = self.keys.ours((trace, h2w))
        return self.keys.upstreams(self._take(
            UPDATE, trace=trace, x=xs, f=fs, D=list(h2h), weights=self._traced(weight_vals)))

    def gradient(self, index: Any, trace: Any, signal: Any, weight_vals: Any) -> Any:
        """``{path: gradient}`` of the parameters with a trace; advances the filters, if any."""
        grads, values = self._take(GRADIENT, **self._operands(index, trace, signal, weight_vals))
        filters = self._filters
        for key, value in values.items():
            filters[key].value = value
        return grads

    def previous(self, index: Any, trace: Any, signal: Any, weight_vals: Any) -> Any:
        """``{path: gradient}`` that a signal on the previous hidden values makes."""
        return self._take(PREVIOUS, **self._operands(index, trace, signal, weight_vals))

    def _operands(self, index: Any, trace: Any, signal: Any, weight_vals: Any) -> dict[str, Any]:
        return {'index': index, 'trace': self.keys.ours(trace),
                'filters': {k: s.value for k, s in self._filters.items()},
                'signal': list(signal), 'weights': self._traced(weight_vals)}

    @property
    def _filters(self) -> dict[Any, Any]:
        return self.keys.ours(getattr(self.learner, '_trace_filters', {}))

    def _traced(self, weight_vals: Any) -> Any:
        return {path: weight_vals[path] for path in self.paths}

    def _take(self, primitive: Any, **operands: Any) -> Any:
        flat = [jnp.asarray(leaf) for leaf in jax.tree.leaves(list(operands.values()))]
        trees = {name: jax.tree.structure(value) for name, value in operands.items()}
        traced = self._traced_of(primitive, self._methods[primitive], trees, flat)
        step = self._steps.get(traced.jaxpr)
        if step is None:
            fused = served = by_sample = None
            if primitive in self._fused and self._with_kernels and choice.devices_needed():
                fused = self._traced_of(primitive, self._fused[primitive], trees, flat).jaxpr
                served = functools.partial(
                    _served, self.learner.traceops_settings.backend,
                    [structs for view in self._with_kernels for structs in self._structs(view)])
            if primitive in self._by_sample and self._large:
                by_sample = self._traced_of(
                    primitive, self._by_sample[primitive], trees, flat).jaxpr
            step = self._steps[traced.jaxpr] = Step(
                self.learner, traced.jaxpr, trees, traced.out_tree, fused, served, by_sample)
        return step.bind(primitive, flat)

    def _traced_of(self, primitive: Any, function: Callable[..., Any], trees: dict[str, Any],
                   flat: list[Any]) -> Any:
        """The function as a program of the leaves of its operands; the same one, as jax keeps it,
        for leaves of the same types."""
        key = (primitive, function.__name__, *trees.values())
        if key not in self._functions:
            counts = [tree.num_leaves for tree in trees.values()]

            def of_leaves(*leaves: Any) -> Any:
                parts, start = {}, 0
                for (name, tree), count in zip(trees.items(), counts, strict=True):
                    parts[name] = tree.unflatten(leaves[start:start + count])
                    start += count
                return function(**parts)
            self._functions[key] = jax.jit(of_leaves)
        return self._functions[key].trace(*flat)

    # -- what the steps compute: upstream's own -----------------------------------------------

    def _update(self, trace: Any, x: Any, f: Any, D: Any, weights: Any) -> Any:
        trace, x, f = self.keys.upstreams((trace, x, f))
        if meets_fusion_fault(self.learner):    # of six states and more, compiled wrongly
            return self.keys.ours(upstream.roll_step(
                self.learner, self.learner.graph.hidden_param_op_relations, weights, trace,
                (x, f, D)))
        return self.keys.ours(self._upstream_update(None, trace, (x, f), D, weights, False))

    # -- the update of D-RTRL through its operation, where that has a kernel --------------------

    @functools.cached_property
    def _with_kernels(self) -> tuple[RelationView, ...]:
        """Relations whose update the kernel of ``d_trace_window`` may take, a pass over the trace.

        Of one state XLA makes a single pass over the trace out of the update and the solve that
        follows; of more it makes two for the update alone.
        """
        learner = self.learner
        if not isinstance(learner, upstream.ParamDimVjpAlgorithm):
            return ()
        return tuple(
            view for view in relation_views(learner) if view.is_dense
            and upstream.chunk_rule(view.relation, learner.fast_solve) is not None
            and view.relation.y_var.aval.dtype == jnp.float32
            and all(2 <= g.num_state <= MAX_STATES for g in view.relation.hidden_groups))

    def why(self) -> str:
        """What takes a step by hand on the devices of this process, and why."""
        if not self._with_kernels:
            return ("upstream's program: the trace kernel takes dense float32 relations of "
                    f'2 to {MAX_STATES} states under D-RTRL')
        try:
            found = [why('d_trace_window', *structs, gradient='none',
                         backend=self.learner.traceops_settings.backend)
                     for view in self._with_kernels for structs in self._structs(view)]
        except choice.BackendError as err:      # named and not available: the step will raise too
            return str(err)
        left = [d.reason for d in found if d.backend != 'triton']
        return (f"upstream's program: {left[0]}" if left else
                f'etp_d_trace_window: {found[0].reason}')

    def _structs(self, view: RelationView) -> Iterator[list[Any]]:
        """Operands of the operation, of each group, as shapes."""
        x, O = view.relation.x_var.aval, view.y_shape[-1]  # noqa: E741
        B, I = math.prod(x.shape[:-1]), x.shape[-1]  # noqa: E741
        traces = self.keys.ours(self.learner.etrace_bwg)
        for g in view.relation.hidden_groups:
            S = g.num_state
            trace = traces[view.trace_key(g.index)].value['weight'].dtype
            yield [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
                ((B, I, O, S), trace), ((1, B, I), jnp.float32), ((1, B, O, S), jnp.float32),
                ((B, O, S, S), jnp.float32), ((B, O, S), jnp.float32))]

    def _fused_update(self, trace: Any, x: Any, f: Any, D: Any, weights: Any) -> Any:
        learner, taken = self.learner, self._with_kernels
        rest = [r for r in learner.graph.hidden_param_op_relations
                if not any(r is view.relation for view in taken)]
        old, *factors = self.keys.upstreams((trace, x, f))
        new = self.keys.ours(upstream.roll_step(learner, rest, weights, old, (*factors, D)))
        over = TracePass(learner, taken, False, None)
        for view in taken:
            for g in view.groups:
                key = view.trace_key(g)
                p = f[view.factor_key(g)]
                e, _ = over.dense(view, trace[key], x[view.x_key][None], (p[None], p), D[g],
                                  trace[key], None)
                new[key] = {k: e[k].astype(a.dtype) for k, a in trace[key].items()}
        return new

    def _fused_gradient(self, index: Any, trace: Any, filters: Any, signal: Any,
                        weights: Any) -> Any:
        """In the layout in which the update leaves the trace, so that nothing is transposed."""
        filters = self._filtered(filters, trace)
        return self._paired({**trace, **filters}, signal, weights, self._with_kernels,
                            pair_dense), filters

    # -- the gradient of D-RTRL on a CPU, where a sample's trace is large -----------------------

    @functools.cached_property
    def _large(self) -> tuple[RelationView, ...]:
        """Relations whose trace is paired with the signal a sample at a time.

        Of all samples together XLA transposes the trace first, in copies of it.
        """
        if not isinstance(self.learner, upstream.ParamDimVjpAlgorithm):
            return ()
        traces = self.keys.ours(self.learner.etrace_bwg)

        def is_large(view: RelationView) -> bool:
            shapes = [traces[view.trace_key(g)].value['weight'] for g in view.groups]
            return upstream.is_batched(view.relation) and all(
                a.shape[0] > 1 and a.size * a.dtype.itemsize >= a.shape[0] * _LARGE for a in shapes)
        return tuple(v for v in relation_views(self.learner) if v.is_dense and is_large(v))

    def _gradient_by_sample(self, index: Any, trace: Any, filters: Any, signal: Any,
                            weights: Any) -> Any:
        filters = self._filtered(filters, trace)
        return self._paired({**trace, **filters}, signal, weights, self._large,
                            pair_by_sample), filters

    def _previous_by_sample(self, index: Any, trace: Any, filters: Any, signal: Any,
                            weights: Any) -> Any:
        if not upstream.pairs_with_the_step_before(self.learner):
            return self._previous(index, trace, filters, signal, weights)
        return self._paired(trace, signal, weights, self._large, pair_by_sample)

    def _paired(self, trace: Any, signal: Any, weights: Any, taken: Any, pair: Any) -> Any:
        """What a trace owes to a signal: of some relations by ``pair``, of others upstream's way.
        """
        rest = [r for r in self.learner.graph.hidden_param_op_relations
                if not any(r is view.relation for view in taken)]
        grads = upstream.solve_param_dim(
            self.learner, rest, self.keys.upstreams(trace), signal, weights)
        for view in taken:
            for g in view.groups:
                view.add_to(grads, weights, pair(trace[view.trace_key(g)], signal[g]))
        return grads

    def _filtered(self, filters: Any, trace: Any) -> Any:
        """The low-pass of the trace after this step, if there is one."""
        if not filters:
            return filters
        kappa = self.learner.config.kappa
        return {k: jax.tree.map(lambda a, b: kappa * a + b, old, trace[k])
                for k, old in filters.items()}

    def _gradient(self, index: Any, trace: Any, filters: Any, signal: Any, weights: Any) -> Any:
        filters = self._filtered(filters, trace)
        return self._solve(index, {**trace, **filters} if filters else trace, signal,
                           weights), filters

    def _previous(self, index: Any, trace: Any, filters: Any, signal: Any, weights: Any) -> Any:
        if upstream.pairs_with_the_step_before(self.learner):
            return self._solve(index, trace, signal, weights)
        if filters:
            return self._solve(index, {**trace, **filters}, signal, weights)
        return self._known(self._upstream_previous(  # type: ignore[misc]
            index, self.keys.upstreams(trace), signal, weights))

    def _solve(self, index: Any, trace: Any, signal: Any, weights: Any) -> Any:
        trace = self.keys.upstreams(trace)
        if isinstance(self.learner, upstream.ParamDimVjpAlgorithm):
            return upstream.solve_param_dim(
                self.learner, self.learner.graph.hidden_param_op_relations, trace, signal, weights)
        return self._known(self._upstream_solve(index, trace, signal, weights, {}, None))

    def _known(self, grads: Any) -> Any:
        return {path: grads[path] for path in self.paths if grads.get(path) is not None}
