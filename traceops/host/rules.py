# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The two trace factorisations of braintrace, a window at a time.

A rule has a *carry* (what enters and leaves a window: the trace, or nothing) and turns the
record of a window into weight gradients. ``adjoint-form`` in the design notes has the algebra.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from traceops.host import upstream
from traceops.host.relations import RelationView, relation_views, stack_rows, stack_states
from traceops.kernels.adjoint_window.reference import adjoint_window
from traceops.kernels.es_trace_window.reference import es_trace_step, output_filter
from traceops.window.leaving import leaving_factors

__all__ = ['FactorisedRule', 'ParamDimRule', 'make_rule']

Carry = dict[str, Any]
Grads = dict[Any, Any]


def make_rule(learner: Any, lanes: bool) -> ParamDimRule | FactorisedRule:
    """The rule of a learner's engine. ``lanes``: the learner runs under ``vmap``."""
    if isinstance(learner, upstream.IODimVjpAlgorithm):
        return FactorisedRule(learner, lanes)
    return ParamDimRule(learner, lanes)


def _with_bypass(signal: Any, bypass: Any) -> tuple[Any, Any]:
    """A signal on the previous hidden value is a signal on the previous step (``e_{t-1}``)."""
    if bypass is None:
        return signal, None
    return (tuple(a + _next(b) for a, b in zip(signal, bypass, strict=True)),
            tuple(b[0] for b in bypass))


class _Rule:
    def __init__(self, learner: Any, lanes: bool) -> None:
        self.learner, self.lanes = learner, lanes
        self.views = relation_views(learner)
        self.precision = learner.traceops_settings.precision

    @property
    def paths(self) -> tuple[Any, ...]:
        """Parameters that the rule gives a gradient."""
        return tuple(dict.fromkeys(p for v in self.views for p in v.paths))

    def _feeding(self, group: int) -> list[RelationView]:
        return [v for v in self.views if group in v.groups]

    def _signals(self, record: Any) -> dict[int, tuple[Any, Any]]:
        bypass = record.get('bypass')
        return {i: _with_bypass(s, None if bypass is None else bypass[i])
                for i, s in enumerate(record['signal'])}

    def inner(self, carry: Carry) -> Any:
        """What the rule folds step by step while the window is simulated."""
        return ()

    def digest(self, inner: Any, record: Any, index: Any) -> tuple[Any, Any]:
        """One step's record: fold some of it into ``inner``, keep the rest."""
        return inner, record

    def _over_lanes(self, fn: Any, *args: Any, axes: Any = 0) -> Any:
        return jax.vmap(fn, in_axes=axes)(*args) if self.lanes else fn(*args)


class ParamDimRule(_Rule):
    """D-RTRL and everything on the per-parameter engine (e-prop's filter included)."""

    def __init__(self, learner: Any, lanes: bool) -> None:
        super().__init__(learner, lanes)
        self.kappa = learner.config.kappa if learner.config.trace_filter == 'kappa' else None
        self.carried = learner.traceops_settings.carry_trace

    def initial(self) -> Carry:
        """The trace that enters; nothing where it is known to be zero, or not carried."""
        if not self.carried or self.learner._trace_is_fresh():
            return {}
        carry: Carry = {'trace': {k: s.value for k, s in self.learner.etrace_bwg.items()}}
        if self.kappa is not None:
            carry['filter'] = {k: s.value for k, s in self.learner._trace_filters.items()}
        return carry

    def store(self, carry: Carry) -> None:
        """Write the trace that leaves into the learner's states."""
        if not self.carried:
            return
        for key, value in carry['trace'].items():
            self.learner.etrace_bwg[key].value = value
        for key, value in carry.get('filter', {}).items():
            self.learner._trace_filters[key].value = value

    def gradients(self, carry: Carry, inner: Any, record: Any, weight_vals: Any,
                  index: Any) -> Grads:
        """Weight gradients of the window, the entering trace's contribution included."""
        grads: Grads = {}
        deltas: dict[int, Any] = {}
        entering, filtered = [], []
        for g, (signal, before) in self._signals(record).items():
            feeding = self._feeding(g)
            out, enters, decays = adjoint_window(
                signal, record['D'][g], [record['f'][v.factor_key(g)] for v in feeding],
                self.kappa)
            for view, delta in zip(feeding, out, strict=True):
                known = deltas.get(id(view))
                deltas[id(view)] = delta if known is None else known + delta
            first = decays if self.kappa is not None else enters
            if before is not None:
                first = tuple(a + b for a, b in zip(first, before, strict=True))
            entering.append(stack_states(enters if self.kappa is not None else first))
            filtered.append(stack_states(first))
        for view in self.views:
            x = record['x'].get(view.x_key)
            view.add_to(grads, weight_vals,
                        view.gradient(weight_vals, x, deltas[id(view)], self.precision))
        if carry:
            self._add_entering(grads, carry['trace'], entering, weight_vals)
            if self.kappa is not None:
                self._add_entering(grads, carry['filter'], filtered, weight_vals)
        return grads

    def _add_entering(self, grads: Grads, trace: Any, signals: Any, weight_vals: Any) -> None:
        solve = partial(upstream.solve_param_dim, self.learner, weight_vals=weight_vals)
        more = self._over_lanes(lambda e, s: solve(e, s), trace, signals)
        for path, value in more.items():
            value = jax.tree.map(lambda a: a.sum(0), value) if self.lanes else value
            grads[path] = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads[path], value)

    def leave(self, carry: Carry, inner: Any, record: Any, weight_vals: Any,
              filtering: bool = True) -> Carry:
        """The trace after the window: one pass for a whole window where upstream has one."""
        if not self.carried:
            return carry
        closed = [v for v in self.views
                  if upstream.chunk_rule(v.relation, self.learner.fast_solve) is not None]
        stepped = [v for v in self.views if v not in closed]
        kappa = self.kappa if filtering else None
        trace: dict[Any, Any] = {}
        filters: dict[Any, Any] = {}
        for g in range(len(record['D'])):
            views = [v for v in closed if g in v.groups]
            if not views:
                continue
            factors = [record['f'][v.factor_key(g)] for v in views]
            self._leave_closed(g, views, factors, None, carry.get('trace'), record, trace)
            if kappa is not None:
                self._leave_closed(g, views, factors, kappa, carry.get('trace'), record, filters)
        if kappa is not None and carry:
            steps = record['D'][0][0][0].shape[0]
            for key in filters:
                filters[key] = jax.tree.map(lambda new, old: new + kappa ** steps * old,
                                            filters[key], carry['filter'][key])
        if stepped:
            self._leave_stepped(stepped, carry, record, weight_vals, kappa, trace, filters)
        if self.kappa is not None and kappa is None:
            filters = carry['filter'] if carry else self._zeros(self.learner._trace_filters)
        return {'trace': trace, **({'filter': filters} if self.kappa is not None else {})}

    def _leave_closed(self, group: int, views: Any, factors: Any, kappa: float | None,
                      old: Any, record: Any, into: dict[Any, Any]) -> None:
        leaving, entering = leaving_factors(record['D'][group], factors, kappa)
        for view, factor in zip(views, leaving, strict=True):
            key = view.trace_key(group)
            update = partial(_rank_t_update, view.relation)
            p = stack_states(factor)
            x = record['x'].get(view.x_key)
            if old is None:
                zero = {k: jnp.zeros((1,) * (v.ndim - self.lanes), v.dtype)
                        for k, v in self.learner.etrace_bwg[key].value.items()}
                fn = lambda x_, p_, u=update, z=zero: u(x_, p_, None, z)  # noqa: E731
                into[key] = self._over_lanes(fn, x, p, axes=(None if x is None else 1, 1))
            else:
                into[key] = self._over_lanes(update, x, p, entering, old[key],
                                             axes=(None if x is None else 1, 1, 0, 0))
            into[key] = {k: into[key][k].astype(v.dtype)
                         for k, v in self.learner.etrace_bwg[key].value.items()}

    def _leave_stepped(self, views: Any, carry: Carry, record: Any, weight_vals: Any,
                       kappa: float | None, trace: Any, filters: Any) -> None:
        """Ops without a closed form upstream: its own step, T times (its own cost)."""
        relations = [v.relation for v in views]
        keys = [v.trace_key(g) for v in views for g in v.groups]
        e0 = {k: carry['trace'][k] if carry else self.learner.etrace_bwg[k].value for k in keys}
        f0 = None
        if kappa is not None:
            f0 = {k: carry['filter'][k] if carry else self.learner._trace_filters[k].value
                  for k in keys}
        xs = (record['x'],
              {k: stack_states(f) for k, f in record['f'].items()},
              [stack_rows(D) for D in record['D']])

        def roll(e: Any, filt: Any, factors: Any) -> Any:
            e = upstream.roll_step(self.learner, relations, weight_vals, e, factors)
            if kappa is not None:
                filt = jax.tree.map(lambda a, b: kappa * a + b, filt, e)
            return e, filt

        def body(c: Any, factors: Any) -> Any:
            return self._over_lanes(roll, *c, factors), None

        (e1, f1), _ = jax.lax.scan(body, (e0, f0), xs)
        trace.update(e1)
        if kappa is not None:
            filters.update(f1)

    def _zeros(self, states: Any) -> Any:
        return {k: s.value for k, s in states.items()}


def _rank_t_update(relation: Any, x: Any, p: Any, entering: Any, old: Any) -> dict[str, Any]:
    """``M e_0 + sum_s x_s (x) p_s`` through upstream's own closed form for the op.

    The products with the Jacobians are in ``p`` already, so upstream's rule is called with
    one-by-one identities in their place (which XLA removes).
    """
    rules = upstream.rules_of(relation)
    one = jnp.ones((1,) * (p.ndim + 1), p.dtype)
    S = p.shape[-1]
    start = old
    if entering is not None:
        start = {}
        for name in old:
            columns = []
            for i in range(S):
                terms = [rules.recurrent(entering[i][j][..., None, None],
                                         {k: v[..., j:j + 1] for k, v in old.items()}, 1)[name]
                         for j in range(S)]
                columns.append(sum(terms))
            start[name] = jnp.concatenate(columns, axis=-1)
    return rules.chunk(x, p, one, one[0], start, 1)


class FactorisedRule(_Rule):
    """ES-D-RTRL and everything on the input/output-factorised engine."""

    @property
    def bypass(self) -> bool:
        return upstream.has_bypass(self.learner)

    @cached_property
    def _filtered_while_simulating(self) -> tuple[Any, ...]:
        """Inputs whose low-pass is kept step by step: all that enter the filter as they are.

        The others (an embedding's indices) would be recorded as something larger (one-hot):
        for them the filter moves to the output side (:func:`output_filter`).
        """
        return tuple(dict.fromkeys(
            v.x_key for v in self.views
            if v.has_input and upstream.x_representation(v.relation) is None))

    def inner(self, carry: Carry) -> Any:
        """Both factors are folded while the window is simulated."""
        return {'f': carry['f'], 'x': {k: carry['x'][k] for k in self._filtered_while_simulating}}

    def digest(self, inner: Any, record: Any, index: Any) -> tuple[Any, Any]:
        r""":math:`(g_t \cdot L_t) / c_t` and the input of one step, filtered where it can be."""
        correction = self._correction(index)
        new, instant = {}, {}
        for view in self.views:
            for g in view.groups:
                key = view.factor_key(g)
                new[key], instant[key] = es_trace_step(
                    record['signal'][g], record['D'][g], record['f'][key], inner['f'][key],
                    correction, self.learner.decay_f)
        low_pass = {k: (self.learner.decay_x * a + record['x'][k]).astype(a.dtype)
                    for k, a in inner['x'].items()}
        kept = {'x': {**record['x'], **low_pass}, 'instant': instant}
        if self.bypass:
            kept['bypass'] = record['bypass']
            kept['factor'] = {k: tuple(a / correction.astype(a.dtype) for a in v)
                              for k, v in new.items()}
        return {'f': new, 'x': low_pass}, kept

    def initial(self) -> Carry:
        """Both factors, as they enter."""
        learner = self.learner
        return {'x': {k: s.value for k, s in learner.etrace_xs.items()},
                'f': {k: _split(s.value) for k, s in learner.etrace_dfs.items()}}

    def store(self, carry: Carry) -> None:
        """Write both factors into the learner's states."""
        for key, value in carry['x'].items():
            self.learner.etrace_xs[key].value = value
        for key, value in carry['f'].items():
            self.learner.etrace_dfs[key].value = stack_states(value)

    def gradients(self, carry: Carry, inner: Any, record: Any, weight_vals: Any,
                  index: Any) -> Grads:
        """Weight gradients of the window."""
        grads: Grads = {}
        first_correction = self._correction(index - 1)
        for view in self.views:
            instant = before = None
            for g in view.groups:
                key = view.factor_key(g)
                now = record['instant'][key]
                if self.bypass:      # a signal on h_{t-1} pairs with the factors of step t-1
                    late = _dot(tuple(_next(b) for b in record['bypass'][g]),
                                record['factor'][key])
                    first = _dot(tuple(b[0] for b in record['bypass'][g]), carry['f'][key])
                    first = first / first_correction.astype(first.dtype)
                    before = first if before is None else before + first
                    now = now + late
                instant = now if instant is None else instant + now
            view.add_to(grads, weight_vals,
                        self._solve(view, carry, record, weight_vals, instant, before))
        return grads

    def _solve(self, view: RelationView, carry: Carry, record: Any, weight_vals: Any,
               instant: Any, before: Any) -> dict[str, Any]:
        x = record['x'].get(view.x_key)
        named = view.gradient(weight_vals, x, instant, self.precision)
        entering = dict.fromkeys(named, before)
        if view.has_input and view.x_key not in self._filtered_while_simulating:
            # the filter acts on the gradients that read the input, on no other
            decay, r = self.learner.decay_x, output_filter(instant, self.learner.decay_x)
            through = view.gradient(weight_vals, x, r, self.precision)
            late = decay * r[0] if before is None else decay * r[0] + before
            for key, reads in view.operands_reading_input(weight_vals).items():
                if reads:
                    named[key], entering[key] = through[key], late
        for ct in {id(v): v for v in entering.values() if v is not None}.values():
            more = self._with_entering_input(view, carry['x'].get(view.x_key), ct, weight_vals)
            named.update({k: named[k] + more[k] for k in named if entering[k] is ct})
        return named

    def _with_entering_input(self, view: RelationView, a0: Any, cotangent: Any,
                             weight_vals: Any) -> dict[str, Any]:
        """What the filtered input that entered the window contributes."""
        def solve(a: Any, ct: Any) -> Any:
            return upstream.solve_factorised(
                view.relation, a, ct.reshape(view.y_shape) if a is not None else ct, weight_vals)

        out = self._over_lanes(solve, a0, cotangent, axes=(None if a0 is None else 0, 0))
        return jax.tree.map(lambda v: v.sum(0), out) if self.lanes else out

    def leave(self, carry: Carry, inner: Any, record: Any, weight_vals: Any,
              filtering: bool = True) -> Carry:
        """Both factors after the window."""
        inputs = dict(inner['x'])
        for view in self.views:
            if view.has_input and view.x_key not in inputs:
                inputs[view.x_key] = self._low_pass(
                    carry['x'][view.x_key], record['x'][view.x_key],
                    upstream.x_representation(view.relation))
        return {'x': inputs, 'f': inner['f']}

    def _low_pass(self, a: Any, xs: Any, repr_of: Any) -> Any:
        def step(a_: Any, x: Any) -> Any:
            return (self.learner.decay_x * a_ + self._over_lanes(repr_of, x)).astype(a.dtype), None
        return jax.lax.scan(step, a, xs)[0]

    def _correction(self, index: Any) -> Any:
        """Upstream's warm-up correction, indexed as upstream indexes it."""
        c = 1. - jnp.power(self.learner.decay_f, index + 1)
        return jnp.maximum(jnp.where(index < 1000, c, 1.), 1e-8)


def _dot(a: Any, b: Any) -> Any:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _next(a: Any) -> Any:
    """``a_{t+1}`` at ``t``, zero after the last step."""
    return jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])


def _split(value: Any) -> tuple[Any, ...]:
    return tuple(value[..., i] for i in range(value.shape[-1]))
