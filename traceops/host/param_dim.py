# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The per-parameter rule: D-RTRL and everything on its engine, a window at a time."""

from __future__ import annotations

from typing import Any

import jax

from traceops.host.relations import split_states, stack_states
from traceops.host.rule import Carry, Grads, Rule, whole, with_every_step
from traceops.host.trace_pass import TracePass
from traceops.kernels.es_trace_window.reference import output_filter
from traceops.kernels.layout import steps_of
from traceops.ops import adjoint_window

__all__ = ['ParamDimRule']


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
        carry: Carry = {'trace': _values(self.learner.etrace_bwg)}
        if self.kappa is not None:
            carry['filter'] = _values(self.learner._trace_filters)
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
            given = with_every_step(record, (signal, record['D'][g], factors))
            out, *last = self._adjoint(g, given, carry)
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
                        self._gradient(view, weight_vals, x, deltas[id(view)]))
        signals = [entering, *([filtered] if self.kappa is not None else [])]
        if not self.carried:
            return grads, {'arriving': signals}
        more, carry = TracePass(self.learner, self.views, self.lanes, self.kappa)(
            carry, signals, record, weight_vals)
        for path, value in more.items():
            grads[path] = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads[path], value)
        return grads, carry

    def _adjoint(self, g: int, given: Any, carry: Carry) -> Any:
        """The scan of one group: deltas, and the signals that pair with what enters."""
        signal, jacobian, factors = given
        backend, kappa = self.backend, self.kappa
        if 'arriving' not in carry:
            return adjoint_window(signal, jacobian, factors, kappa=kappa, backend=backend)
        signal = whole(signal, steps_of(given))
        adjoint, *low_pass = (split_states(a[g]) for a in carry['arriving'])
        if kappa is not None:               # what arrives as adjoint is filtered already
            signal = tuple(output_filter(a.at[-1].add(b), kappa)
                           for a, b in zip(signal, low_pass[0], strict=True))
        filtered = [stack_states([kappa * a[0] for a in signal])] if kappa is not None else []
        signal = tuple(a.at[-1].add(b) for a, b in zip(signal, adjoint, strict=True))
        return (*adjoint_window(signal, jacobian, factors, backend=backend), *filtered)

    def leave(self, carry: Carry, record: Any, weight_vals: Any) -> Carry:
        """The trace after a window that asks for no gradient; its filter does not move."""
        new = TracePass(self.learner, self.views, self.lanes, None)(
            carry, None, record, weight_vals)[1]
        if self.kappa is not None:
            new['filter'] = carry['filter'] if carry else _values(self.learner._trace_filters)
        return new


def _values(states: Any) -> dict[Any, Any]:
    return {k: s.value for k, s in states.items()}
