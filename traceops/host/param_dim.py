# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The per-parameter rule: D-RTRL and everything on its engine, a window at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from traceops.host import upstream
from traceops.host.relations import split_states, stack_rows, stack_states
from traceops.host.rule import Carry, Grads, Rule, following, whole, with_every_step
from traceops.host.trace_pass import TracePass
from traceops.kernels.adjoint_window.reference import adjoint_step
from traceops.kernels.es_trace_window.reference import output_filter
from traceops.kernels.layout import steps_of
from traceops.ops import adjoint_window

__all__ = ['ParamDimRule']


class ParamDimRule(Rule):
    """D-RTRL and everything on the per-parameter engine (e-prop's filter included)."""

    backward = True

    def __init__(self, learner: Any, lanes: bool, at_once: bool = False) -> None:
        super().__init__(learner, lanes, at_once)
        self.kappa = learner.config.kappa if learner.config.trace_filter == 'kappa' else None
        self.carried = learner.traceops_settings.carry_trace
        self.bypass = upstream.has_bypass(learner)
        self.trace_pass = TracePass(learner, self.views, lanes, self.kappa)

    @property
    def stores(self) -> bool:
        """Where a trace is carried."""
        return self.carried

    @property
    def folds(self) -> bool:
        """Not where upstream's own step rolls a trace forward: it needs the record whole."""
        return not self.at_once and not (self.carried and self.trace_pass.stepped)

    @property
    def windows_are_cheap(self) -> bool:
        """Not where a trace is carried, which every window passes over."""
        return self.folds and not self.carried

    @property
    def fixed_bytes(self) -> int:
        """With traces, as they enter a window and as they leave it."""
        traces = len(self.trace_pass.decay) * self.trace_pass.bytes if self.carried else 0
        return super().fixed_bytes + 2 * traces

    @property
    def copied_bytes(self) -> int:
        """Both factors of a trace that leaves, sample by sample."""
        return self.trace_pass.factor_bytes if self.carried else 0

    def initial(self) -> Carry:
        """The trace that enters; nothing where it is known to be zero, or not carried."""
        if not self.carried or self.learner._trace_is_fresh():
            return {}
        return {name: _values(states) for name, states in self.trace_pass.states.items()}

    def store(self, carry: Carry) -> None:
        """Write the trace that leaves into the learner's states."""
        if not self.carried:
            return
        for name, states in self.trace_pass.states.items():
            for key, state in states.items():
                state.value = carry[name][key]

    # -- step by step, from the last to the first ------------------------------------------------

    def inner(self, carry: Carry) -> Any:
        """What arrives from after the window, of every group: ``[(adjoint, low-pass), ...]``.

        The first is the loss; then, for a trace that leaves, come its states, one by one.
        """
        zeros = [split_states(jnp.zeros_like(port))
                 for port in self.learner._recorder.ports['signal'].value]
        arriving = [[split_states(a) for a in signals] for signals in carry.get('arriving', ())]
        adjoint, low_pass = (*arriving, *[zeros] * (2 - len(arriving)))
        groups = []
        for zero, *of_loss in zip(zeros, adjoint, low_pass, strict=True):
            units = [tuple(jnp.ones_like(a) if i == j else a for j, a in enumerate(zero))
                     for i in range(len(zero))]
            groups.append([tuple(of_loss), *(
                (unit, zero) if kappa is None else (zero, unit)
                for kappa in self._leaving for unit in units)])
        return {'groups': groups, 'bypass': zeros if self.bypass else None}

    @property
    def _leaving(self) -> tuple[float | None, ...]:
        """The low-pass of every trace that leaves."""
        return tuple(self.trace_pass.decay.values()) if self.carried else ()

    def fold_step(self, inner: Any, record: Any) -> tuple[Any, Any]:
        """One step of every adjoint: deltas of the ops, products for the trace that leaves."""
        deltas: dict[int, Any] = {}
        products, groups = [], []
        for g, arriving in enumerate(inner['groups']):
            signal, feeding = record['signal'][g], self._feeding(g)
            if self.bypass:         # on h_{t-1}: a signal of the step before
                signal = tuple(map(jnp.add, signal, inner['bypass'][g]))
            nothing = tuple(map(jnp.zeros_like, signal))
            kappas = [self.kappa, *(k for k in self._leaving for _ in signal)]
            steps = [adjoint_step(
                nothing if i else signal, record['D'][g],
                [record['f'][v.factor_key(g)] for v in feeding], *pair, kappa)
                for i, (pair, kappa) in enumerate(zip(arriving, kappas, strict=True))]
            groups.append([(adjoint, low_pass) for adjoint, low_pass, _ in steps])
            products.append([out for _, _, out in steps[1:]])
            self._add(deltas, feeding, steps[0][2])
        return ({'groups': groups, 'bypass': record.get('bypass')},
                {'deltas': deltas, 'products': products})

    def _add(self, deltas: dict[int, Any], feeding: Any, more: Any) -> None:
        """A relation that feeds several groups has a delta of each."""
        for view, delta in zip(feeding, more, strict=True):
            i = self.views.index(view)
            deltas[i] = deltas[i] + delta if i in deltas else delta

    def _gathered(self, inner: Any, record: Any) -> dict[str, Any]:
        """What was folded as :meth:`fold_window` gives it."""
        signals = [[stack_states(pairs[0][i]) for pairs in inner['groups']] for i in (0, 1)]
        leaving: dict[str, Any] = {}
        for n, name in enumerate(self.trace_pass.decay if self.carried else ()):
            leaving[name] = {}
            for g, (pairs, products) in enumerate(
                    zip(inner['groups'], record['products'], strict=True)):
                S = len(pairs[0][0])
                rows = slice(n * S, (n + 1) * S)
                p = [stack_states(a) for a in zip(*products[rows], strict=True)]
                leaving[name][g] = p, [a.sum(0) for a in p], stack_rows(
                    [a for a, _ in pairs[1:][rows]])
        return {'deltas': record['deltas'], 'bypass': inner['bypass'], 'leaving': leaving,
                'signals': signals[:1] if self.kappa is None else signals}

    # -- a window at once ------------------------------------------------------------------------

    def fold_window(self, carry: Carry, record: Any, index: Any) -> tuple[Any, Any]:
        """The same for all steps at once: one operation for each group."""
        deltas: dict[int, Any] = {}
        befores, lasts = [], []
        for g, (signal, before) in self._signals(record).items():
            feeding = self._feeding(g)
            factors = [record['f'][v.factor_key(g)] for v in feeding]
            given = with_every_step(record, (signal, record['D'][g], factors))
            out, *last = self._adjoint(g, given, carry)
            self._add(deltas, feeding, out)
            befores.append(before)
            lasts.append(last)
        leaving = self.trace_pass.leaving(carry, record) if self.carried else {}
        return (), {'window': {
            'deltas': deltas, 'bypass': befores if self.bypass else None, 'leaving': leaving,
            'signals': [list(s) for s in zip(*lasts, strict=True)]}}

    def _signals(self, record: Any) -> dict[int, tuple[Any, Any]]:
        if not self.bypass:
            return {i: (s, None) for i, s in enumerate(record['signal'])}
        record = whole(record)
        return {i: _with_bypass(s, b)
                for i, (s, b) in enumerate(zip(record['signal'], record['bypass'], strict=True))}

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

    # -- either way --------------------------------------------------------------------------------

    def close(self, carry: Carry, inner: Any, record: Any, weight_vals: Any,
              index: Any) -> tuple[Grads, Carry]:
        """Weight gradients of the window, and what the next one to be taken is given.

        That is the trace, from window to window; or, where none is carried and windows are
        taken from the last to the first, the signal that arrives at the end of the one before.
        """
        found = record['window'] if 'window' in record else self._gathered(inner, record)
        signals = found['signals']
        if self.bypass:
            signals[-1] = [a + stack_states(b)
                           for a, b in zip(signals[-1], found['bypass'], strict=True)]
        grads: Grads = {}
        for i, view in enumerate(self.views):
            view.add_to(grads, weight_vals, self._gradient(
                view, weight_vals, record['x'].get(view.x_key), found['deltas'][i]))
        if not self.carried:
            return grads, {'arriving': signals}
        past = self.learner._warm_up.steps_of(carry.get('trace'), weight_vals)
        more, carry = self.trace_pass(carry, None if past else signals, record, found['leaving'],
                                      weight_vals)
        if past:
            self.recalled, (steps, before) = True, past
            more = self._of_steps_before(steps, before, signals, weight_vals, index)
        for path, value in more.items():
            grads[path] = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads[path], value)
        return grads, carry

    def keeps(self, record_bytes: int) -> bool:
        """Whether steps without a loss are remembered for a gradient that follows.

        Where their trace takes a pass a step.
        """
        return bool(self.trace_pass.stepped) and self.kappa is None and \
            record_bytes <= self.budget

    def _of_steps_before(self, record: Any, before: Any, signals: Any, weight_vals: Any,
                         index: Any) -> Grads:
        """What steps without a loss owe to the signals that arrive at their end."""
        rule, T = type(self)(self.learner, self.lanes, at_once=True), steps_of(record)
        rule.carried = False
        nothing = [split_states(jnp.zeros((T, *port.shape), port.dtype))
                   for port in self.learner._recorder.ports['signal'].value]
        record = {**record, 'signal': nothing, **({'bypass': nothing} if self.bypass else {})}
        carry = {'arriving': signals}
        inner, results = rule.fold_window(carry, record, index)
        grads, carry = rule.close(carry, inner, {**record, **results}, weight_vals, index)
        if before:
            self.trace_pass.pair(self.views, before, carry['arriving'][0], weight_vals, grads)
        return grads

    def leave(self, carry: Carry, record: Any, weight_vals: Any) -> Carry:
        """The trace after a window that asks for no gradient; its filter does not move."""
        over = TracePass(self.learner, self.views, self.lanes, None)
        new = over(carry, None, record, over.leaving(carry, record), weight_vals)[1]
        if self.kappa is not None:
            filters = carry.get('filter') or _values(self.trace_pass.states['filter'])
            if filters:         # a loop without a gradient carries none
                new['filter'] = filters
        return new


def _with_bypass(signal: Any, bypass: Any) -> tuple[Any, Any]:
    """A signal on the previous hidden value is a signal on the previous step (``e_{t-1}``)."""
    return (tuple(a + following(b) for a, b in zip(signal, bypass, strict=True)),
            tuple(b[0] for b in bypass))


def _values(states: Any) -> dict[Any, Any]:
    return {k: s.value for k, s in states.items()}
