# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The factorised rule: ES-D-RTRL and everything on its engine, a window at a time."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.compiler.shared_signal import SharedSignal
from traceops.host import upstream
from traceops.host.relations import RelationView, split_states, stack_states
from traceops.host.rule import Carry, Grads, Rule, following, whole
from traceops.kernels.es_trace_window.reference import (
    es_trace_step,
    instant_gradient,
    output_filter,
)
from traceops.kernels.layout import steps_of
from traceops.ops import es_trace_window

__all__ = ['FactorisedRule']


class FactorisedRule(Rule):
    """ES-D-RTRL and everything on the input/output-factorised engine."""

    factorised = True

    @property
    def bypass(self) -> bool:
        return upstream.has_bypass(self.learner)

    @property
    def _late(self) -> int:
        """How much later a signal on previous hidden values is indexed than their own step."""
        return 1 if upstream.pairs_with_the_step_before(self.learner) else 0

    @cached_property
    def _filtered_while_simulating(self) -> tuple[Any, ...]:
        """Inputs whose low-pass is kept step by step: all that enter the filter as they are.

        For the others the filter moves to the output side (:func:`output_filter`): where it
        would leave something larger to record (an embedding's indices: one-hot), or none of the
        zeros among spikes that a product is to find; and for all, where steps are folded at
        once.
        """
        return () if self.at_once else tuple(dict.fromkeys(
            v.x_key for v in self.views
            if v.has_input and upstream.x_representation(v.relation) is None
            and not v.of_events))

    def inner(self, carry: Carry) -> Any:
        """Both factors are folded while the window is simulated."""
        carry = carry or self._factors()
        return {'f': carry['f'], 'x': {k: carry['x'][k] for k in self._filtered_while_simulating}}

    def fold_step(self, inner: Any, record: Any) -> tuple[Any, Any]:
        """The factor and the input of one step, filtered where it can be."""
        new, factor = {}, {}
        for view in self.views:
            for g in view.groups:
                key, signal = view.factor_key(g), record['signal'][g]
                new[key] = es_trace_step(record['D'][g], record['f'][key], inner['f'][key],
                                         self.learner.decay_f)
                shared = isinstance(signal, SharedSignal)
                factor[key] = signal.paired(new[key]) if shared else new[key]
        low_pass = {k: (self.learner.decay_x * a + record['x'][k]).astype(a.dtype)
                    for k, a in inner['x'].items()}
        return {'f': new, 'x': low_pass}, {'x': {**record['x'], **low_pass}, 'factor': factor}

    def fold_window(self, carry: Carry, record: Any, index: Any) -> tuple[Any, Any]:
        """The same for all steps at once: one operation for each factor."""
        inner, indices = self.inner(carry), _indices(index, steps_of(record))
        if self.bypass:         # the factor of every step is needed, not only its product
            return jax.lax.scan(self.fold_step, inner, whole(record))
        new, filtered, total = {}, {}, {}
        for view in self.views:
            for g in view.groups:
                key = view.factor_key(g)
                filtered[key], total[key], new[key] = es_trace_window(
                    record['signal'][g], record['D'][g], record['f'][key], inner['f'][key],
                    decay_x=self.learner.decay_x, decay_f=self.learner.decay_f,
                    correction=self._correction(indices),
                    backend=self.backend)
        return ({'f': {k: split_states(v) for k, v in new.items()}, 'x': {}},
                {'x': record['x'], 'filtered': filtered, 'total': total})

    def initial(self) -> Carry:
        """Both factors, as they enter; nothing where they are known to be zero."""
        return {} if self.learner._trace_is_fresh() else self._factors()

    def _factors(self) -> Carry:
        xs, fs = self._states
        return {'x': {k: s.value for k, s in xs.items()},
                'f': {k: split_states(s.value) for k, s in fs.items()}}

    @property
    def _states(self) -> Any:
        learner = self.learner
        return learner._recorder.keys.ours((learner.etrace_xs, learner.etrace_dfs))

    def store(self, carry: Carry) -> None:
        """Write both factors into the learner's states."""
        xs, fs = self._states
        for key, value in carry['x'].items():
            xs[key].value = value
        for key, value in carry['f'].items():
            fs[key].value = stack_states(value)

    def close(self, carry: Carry, inner: Any, record: Any, weight_vals: Any,
              index: Any) -> tuple[Grads, Carry]:
        """Weight gradients of the window, and both factors after it."""
        grads: Grads = {}
        for view in self.views:
            plain, filtered, before = self._cotangents(view, carry, record, index)
            view.add_to(grads, weight_vals, self._solve(
                view, carry, record, weight_vals, plain, filtered, before))
        return grads, self._leave(carry, inner, record)

    def keeps(self, record_bytes: int) -> bool:
        """Steps without a loss are not gone through again: their factors cost little."""
        return False

    def leave(self, carry: Carry, record: Any, weight_vals: Any) -> Carry:
        """Both factors after a window that asks for no gradient."""
        steps = steps_of(record)
        signal = {g: tuple(jnp.zeros((steps, *a.shape[1:]), a.dtype) for a in rows[0])
                  for g, rows in enumerate(record['D'])}
        record = {**record, 'x': whole(record['x'], steps), 'signal': signal}
        inner, _ = self.fold_window(carry, record, jnp.int32(0))
        return self._leave(carry, inner, record)

    def _cotangents(self, view: RelationView, carry: Carry, record: Any,
                    index: Any) -> tuple[Any, Any, Any]:
        """Of the outputs of an op: as they are, filtered, and those at the entering factors.

        ``[T, ...]`` each (as they are: their sum over steps, ``[1, ...]``, where that is what
        is known); ``None`` where there is nothing, or no need for it.
        """
        keys = [(g, view.factor_key(g)) for g in view.groups]
        index = index + self._late
        if 'total' in record:
            return (sum(record['total'][key] for _, key in keys)[None],
                    sum(record['filtered'][key] for _, key in keys), None)
        steps = steps_of(record['factor'])
        correction = self._correction(_indices(index, steps))
        plain, before = 0., None
        for g, key in keys:
            signal, factor = record['signal'][g], record['factor'][key]
            if isinstance(signal, SharedSignal):
                signal, factor = (signal.like(factor),), (factor,)
            if self.bypass:         # a signal on h_{t-1} pairs with the factors of step t-1
                bypass = whole(record['bypass'][g], steps)
                signal = tuple(a + following(b) for a, b in zip(signal, bypass, strict=True))
                if carry:
                    first = instant_gradient(tuple(b[0] for b in bypass), carry['f'][key],
                                             self._correction(index - 1))
                    before = first if before is None else before + first
            plain = plain + instant_gradient(signal, factor, correction)
        if not view.has_input or view.x_key in self._filtered_while_simulating:
            return plain, None, before
        return plain, output_filter(plain, self.learner.decay_x), before

    def _solve(self, view: RelationView, carry: Carry, record: Any, weight_vals: Any,
               plain: Any, filtered: Any, before: Any) -> dict[str, Any]:
        x = record['x'].get(view.x_key)
        named = self._gradient(view, weight_vals, None if x is None else x[:plain.shape[0]], plain)
        entering = dict.fromkeys(named, before)
        if view.has_input and filtered is not None:
            # the filter acts on the gradients that read the input, on no other
            through = self._gradient(view, weight_vals, x, filtered)
            late = self.learner.decay_x * filtered[0] if carry else None
            late = late if before is None else late + before
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
        if view.has_synapses:       # upstream's own computes with the pattern when it is compiled
            return self._gradient(view, weight_vals, a0[None], cotangent[None])

        def solve(a: Any, ct: Any) -> Any:
            return upstream.solve_factorised(
                view.relation, a, ct.reshape(view.y_shape) if a is not None else ct, weight_vals)

        out = self._over_lanes(solve, a0, cotangent, axes=(None if a0 is None else 0, 0))
        return jax.tree.map(lambda v: v.sum(0), out) if self.lanes else out

    def _leave(self, carry: Carry, inner: Any, record: Any) -> Carry:
        inputs, before = dict(inner['x']), (carry or self._factors())['x']
        for view in self.views:
            if view.has_input and view.x_key not in inputs:
                inputs[view.x_key] = self._low_pass(
                    before[view.x_key], record['x'][view.x_key],
                    upstream.x_representation(view.relation))
        return {'x': inputs, 'f': inner['f']}

    def _low_pass(self, a: Any, xs: Any, repr_of: Any) -> Any:
        """The filtered input that leaves: of inputs that enter the filter as they are, one sum."""
        decay = self.learner.decay_x
        if repr_of is None:
            weights = np.asarray(decay ** np.arange(xs.shape[0] - 1., -1., -1.), a.dtype)
            rows = 1 if self.at_once else 2     # of one, a kernel to compile on a CPU
            late = jnp.tensordot(np.stack([weights] * rows), xs, 1, precision='highest')[0]
            return (decay ** xs.shape[0] * a + late).astype(a.dtype)

        def step(a_: Any, x: Any) -> Any:
            return (decay * a_ + self._over_lanes(repr_of, x)).astype(a.dtype), None
        return jax.lax.scan(step, a, xs)[0]

    def _correction(self, index: Any) -> Any:
        """Upstream's warm-up correction, indexed as upstream indexes it."""
        c = 1. - jax.lax.pow(self.learner.decay_f, index + 1)
        return jnp.maximum(jnp.where(index < 1000, c, 1.), 1e-8)


def _indices(index: Any, steps: int) -> Any:
    """The running index at every step of a window."""
    return index + jnp.arange(steps, dtype=jnp.result_type(index))
