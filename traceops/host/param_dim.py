# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The per-parameter rule: D-RTRL and everything on its engine, a window at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from traceops.host import upstream
from traceops.host.relations import RelationView, split_states, stack_rows, stack_states
from traceops.host.rule import Carry, Grads, Rule
from traceops.kernels.es_trace_window.reference import output_filter
from traceops.ops import adjoint_window
from traceops.window.leaving import leaving_factors

__all__ = ['ParamDimRule']

_LARGE = 2 ** 16      # bytes of one sample's trace from which a pass goes sample by sample


class ParamDimRule(Rule):
    """D-RTRL and everything on the per-parameter engine (e-prop's filter included)."""

    def __init__(self, learner: Any, lanes: bool, at_once: bool = False) -> None:
        super().__init__(learner, lanes, at_once)
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

    def close(self, carry: Carry, inner: Any, record: Any, weight_vals: Any,
              index: Any) -> tuple[Grads, Carry]:
        """Weight gradients of the window, and what the next one to be taken is given.

        That is the trace, from window to window; or, where none is carried and windows are
        taken from the last to the first, the signal that arrives at the end of the one before.
        """
        grads: Grads = {}
        deltas: dict[int, Any] = {}
        entering, filtered = [], []
        for g, (signal, before) in self._signals(record).items():
            feeding = self._feeding(g)
            factors = [record['f'][v.factor_key(g)] for v in feeding]
            out, *last = self._adjoint(g, signal, record['D'][g], factors, carry)
            for view, delta in zip(feeding, out, strict=True):
                known = deltas.get(id(view))
                deltas[id(view)] = delta if known is None else known + delta
            if before is not None:
                last[-1] = last[-1] + stack_states(before)
            entering.append(last[0])
            filtered.append(last[-1])
        for view in self.views:
            x = record['x'].get(view.x_key)
            view.add_to(grads, weight_vals,
                        view.gradient(weight_vals, x, deltas[id(view)], self.precision))
        signals = [entering, *([filtered] if self.kappa is not None else [])]
        if not self.carried:
            return grads, {'arriving': signals}
        more, carry = self._pass_trace(carry, signals if carry else None, record, weight_vals,
                                       self.kappa)
        for path, value in more.items():
            grads[path] = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads[path], value)
        return grads, carry

    def _adjoint(self, g: int, signal: Any, jacobian: Any, factors: Any, carry: Carry) -> Any:
        """The scan of one group: deltas, and the signals that pair with what enters."""
        backend, kappa = self.learner.traceops_settings.backend, self.kappa
        if 'arriving' not in carry:
            return adjoint_window(signal, jacobian, factors, kappa=kappa, backend=backend)
        adjoint, *low_pass = (split_states(a[g]) for a in carry['arriving'])
        if kappa is not None:               # what arrives as adjoint is filtered already
            signal = tuple(output_filter(a.at[-1].add(b), kappa)
                           for a, b in zip(signal, low_pass[0], strict=True))
        filtered = [stack_states([kappa * a[0] for a in signal])] if kappa is not None else []
        signal = tuple(a.at[-1].add(b) for a, b in zip(signal, adjoint, strict=True))
        return (*adjoint_window(signal, jacobian, factors, backend=backend), *filtered)

    def leave(self, carry: Carry, record: Any, weight_vals: Any) -> Carry:
        """The trace after a window that asks for no gradient; its filter does not move."""
        return self._pass_trace(carry, None, record, weight_vals, None)[1]

    def _pass_trace(self, carry: Carry, signals: Any, record: Any, weight_vals: Any,
                    kappa: float | None) -> tuple[Grads, Carry]:
        """One pass over the trace: what it owes to ``signals``, and the trace that leaves."""
        closed = [v for v in self.views
                  if upstream.chunk_rule(v.relation, self.learner.fast_solve) is not None]
        stepped = [v for v in self.views if v not in closed]
        grads, new = self._pass_closed(closed, carry, signals, record, weight_vals, kappa)
        if stepped:
            more = self._pass_stepped(stepped, carry, signals, record, weight_vals, kappa, new)
            for path, value in more.items():
                grads[path] = jax.tree.map(jnp.add, grads[path], value) if path in grads else value
        if self.kappa is not None and kappa is None:
            new['filter'] = carry['filter'] if carry else _values(self.learner._trace_filters)
        return grads, new

    def _pass_closed(self, views: Any, carry: Carry, signals: Any, record: Any,
                     weight_vals: Any, kappa: float | None) -> tuple[Grads, Carry]:
        """Ops with a closed form upstream: one rank-T update, sample by sample."""
        relations = [v.relation for v in views]
        filters = {'trace': None, **({'filter': kappa} if kappa is not None else {})}
        x = [record['x'].get(v.x_key) for v in views]
        leaving: dict[str, Any] = {name: {} for name in filters}
        entering: dict[str, Any] = {name: {} for name in filters}
        for name, decay in filters.items():
            for g in {g: None for v in views for g in v.groups}:
                feeding = [v for v in views if g in v.groups]
                factors, entering[name][g] = leaving_factors(
                    record['D'][g], [record['f'][v.factor_key(g)] for v in feeding], decay)
                leaving[name].update({v.trace_key(g): stack_states(f)
                                      for v, f in zip(feeding, factors, strict=True)})
        old = {name: {k: carry[name][k] for k in leaving['trace']} for name in filters} \
            if carry else None

        def one(x: Any, leaving: Any, entering: Any, old: Any, signals: Any) -> Any:
            grads: Grads = {}
            if signals is not None:
                for name, values in zip(filters, signals, strict=True):
                    more = upstream.solve_param_dim(
                        self.learner, relations, old[name], values, weight_vals)
                    grads = {k: jax.tree.map(jnp.add, grads[k], v) if grads else v
                             for k, v in more.items()}
            return grads, {name: {v.trace_key(g): self._left(
                v, g, x_, leaving[name], entering[name], old, filters[name])
                for v, x_ in zip(views, x, strict=True) for g in v.groups} for name in filters}

        axes = (1, 1, 0, 0, 0)
        return self._per_sample(one, views, (x, leaving, entering, old, signals), axes)

    def _left(self, view: RelationView, group: int, x: Any, leaving: Any, entering: Any,
              old: Any, kappa: float | None) -> dict[str, Any]:
        key = view.trace_key(group)
        like = self.learner.etrace_bwg[key].value
        if old is None:
            zero = {k: jnp.zeros((1,) * (v.ndim - self.lanes), v.dtype) for k, v in like.items()}
            new = _rank_t_update(view.relation, x, leaving[key], None, zero)
        else:
            new = _rank_t_update(view.relation, x, leaving[key], entering[group],
                                 old['trace'][key])
            if kappa is not None:
                steps = leaving[key].shape[0]
                new = {k: v + kappa ** steps * old['filter'][key][k] for k, v in new.items()}
        return {k: new[k].astype(v.dtype) for k, v in like.items()}

    def _per_sample(self, one: Any, views: Any, args: Any, axes: tuple[int, ...]) -> Any:
        """``one`` of every sample: gradients added up, traces stacked.

        On a CPU a large trace is taken sample by sample, so that one sample's trace is read
        from memory once for everything that is done with it (measured: 1.7 times).
        """
        batched = all(upstream.is_batched(v.relation) for v in views)
        if not views or not (self.lanes or batched) or not self._large(views):
            if not self.lanes:
                return one(*args)
            grads, new = jax.vmap(one, in_axes=axes)(*args)
            return jax.tree.map(lambda a: a.sum(0), grads), new

        def given(tree: Any, axis: int) -> Any:       # a batched op is given a batch of one
            return tree if self.lanes else jax.tree.map(
                lambda a: jnp.expand_dims(a, axis), tree)

        def body(total: Any, sample: Any) -> Any:
            grads, new = one(*(given(a, axis) for a, axis in zip(sample, axes, strict=True)))
            new = new if self.lanes else jax.tree.map(lambda a: a[0], new)
            return jax.tree.map(jnp.add, total, grads), new

        samples = tuple(jax.tree.map(lambda a, axis=axis: jnp.moveaxis(a, axis, 0), tree)
                        for tree, axis in zip(args, axes, strict=True))
        first = jax.tree.map(lambda a: a[0], samples)
        grads, _ = jax.eval_shape(
            lambda s: one(*(given(a, axis) for a, axis in zip(s, axes, strict=True))), first)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), grads)
        return jax.lax.scan(body, zeros, samples)

    def _large(self, views: Any) -> bool:
        sizes = [a.nbytes // a.shape[0] for v in views for g in v.groups
                 for a in self.learner.etrace_bwg[v.trace_key(g)].value.values()]
        return jax.default_backend() == 'cpu' and sum(sizes) >= _LARGE

    def _pass_stepped(self, views: Any, carry: Carry, signals: Any, record: Any,
                      weight_vals: Any, kappa: float | None, new: Carry) -> Grads:
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
        new['trace'].update(e1)
        if kappa is not None:
            new['filter'].update(f1)
        grads: Grads = {}
        for old, values in zip((e0, f0), signals or (), strict=False):
            more = self._over_lanes(lambda e, s: upstream.solve_param_dim(
                self.learner, relations, e, s, weight_vals), old, values)
            for path, value in more.items():
                value = jax.tree.map(lambda a: a.sum(0), value) if self.lanes else value
                grads[path] = jax.tree.map(jnp.add, grads[path], value) if path in grads else value
        return grads


def _values(states: Any) -> dict[Any, Any]:
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
