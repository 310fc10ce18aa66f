# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A braintrace learner in a loop whose gradients wait: the rule that closes a window of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from traceops.compiler.shared_signal import SharedSignal
from traceops.engine.step import GRADIENT
from traceops.engine.windows import choose_window
from traceops.host import upstream
from traceops.host.recorder import split_states
from traceops.host.relations import stack_states
from traceops.host.rule import whole, with_every_step
from traceops.host.rules import make_rule
from traceops.loops.analysis import Learner, Product
from traceops.loops.flat import Value
from traceops.loops.learner import LearnerInLoop

__all__ = ['Deferred']


class _Entered:
    """A trace state whose value is that of the loop."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _InLoop:
    """The learner as its rule sees it inside a loop: the traces are the loop's own."""

    def __init__(self, learner: Any) -> None:
        self._learner = learner
        self.etrace_bwg: dict[Any, Any] = {}
        self._trace_filters: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def enter(self, carry: Any) -> None:
        """The traces are those of a rule's carry."""
        keys = self._learner._recorder.keys
        self.etrace_bwg, self._trace_filters = (
            {k: _Entered(v) for k, v in keys.upstreams(carry.get(name, {})).items()}
            for name in ('trace', 'filter'))


class Deferred(LearnerInLoop):
    """A :class:`traceops.loops.deferred.WindowRule`, by the rule of a learner."""

    def __init__(self, found: Learner, at_once: bool = False, from_zero: bool = False) -> None:
        super().__init__(found)
        self.from_zero = from_zero      # the trace that enters the loop is known to be zero
        self.settings = found.owner.traceops_settings
        self.factorised = isinstance(found.owner, upstream.IODimVjpAlgorithm)
        self.learner: Any = found.owner if self.factorised else _InLoop(found.owner)
        rule_of: Any = make_rule
        self.rule = rule_of(self.learner, found.lanes, at_once)
        #: Whether the record of a step is folded before it is stored.
        self.folds = not (at_once or self.rule.backward)
        self.bypass = upstream.has_bypass(found.owner)

    def window(self, steps: int, step_bytes: int) -> int:
        return choose_window(steps, step_bytes + self.rule.copied_bytes, self.settings.window,
                             self.rule.window_budget())

    # -- what enters and leaves ----------------------------------------------------------------

    def entering(self, init: Sequence[Any], once: bool) -> Any:
        trace, filters = self.carried(init)
        if self.factorised:
            xs, fs = trace
            return {'x': xs, 'f': {k: split_states(v) for k, v in fs.items()}}
        carry = {'trace': trace} if filters is None else {'trace': trace, 'filter': filters}
        self.learner.enter(carry)
        return {} if once and self.from_zero else carry

    def leaving(self, carry: Any) -> dict[int, Any]:
        if self.factorised:
            fs = {k: stack_states(v) for k, v in carry['f'].items()}
            return self.carries((carry['x'], fs), None)
        return self.carries(carry['trace'], carry.get('filter'))

    # -- step by step ----------------------------------------------------------------------------

    def inner(self, carry: Any) -> Any:
        """What is folded step by step, of each product."""
        return [self.rule.inner(carry) if self.folds else () for _ in self.products]

    def fold_step(self, inner: Any, env: dict[Value, Any]) -> tuple[Any, Any]:
        operands = self.factors(env)
        factors = self.found.owner._recorder.of_step(
            operands['x'], operands['f'], operands['D'])
        if not self.products:
            return inner, factors
        new, records = [], []
        for product, folded in zip(self.products, inner, strict=True):
            signals = self._signals(product, env)
            record = {**factors, **signals}
            if self.folds:
                if not self.bypass:     # at hand: paired in the loop, and not recorded
                    record['signal'] = [SharedSignal(s, None) for s in signals['signal']]
                    signals = {'signal': [SharedSignal((), None) for _ in signals['signal']]}
                folded, results = self.rule.fold_step(folded, record)
                record = {**results, **signals}
            new.append(folded)
            records.append((record, self.index(product, env)))
        return new, records

    def _signals(self, product: Product, env: dict[Value, Any]) -> dict[str, Any]:
        scaled = [split_states(s) for s in self.signals(product, env)]
        nothing = [tuple(map(jnp.zeros_like, s)) for s in scaled]
        if product.node.primitive is GRADIENT:
            return {'signal': scaled, **({'bypass': nothing} if self.bypass else {})}
        return {'signal': nothing, 'bypass': scaled}

    # -- window by window ------------------------------------------------------------------------

    def close(self, carry: Any, inner: Any, record: Any, constant: Callable[[Value], Any],
              steps: int) -> tuple[dict[Product, dict[Value, Any]], Any]:
        weights = self.weights(constant)
        if not self.factorised and carry:
            self.learner.enter(carry)
        if not self.products:
            return {}, self.rule.leave(carry, whole(record, steps), weights)
        solved, leaving = {}, None
        for product, folded, (one, index) in zip(self.products, inner, record, strict=True):
            if not self.folds:
                one = {**one, 'x': whole(one['x'], steps)}
                folded, results = self.rule.fold_window(
                    carry, with_every_step(jax.ShapeDtypeStruct((steps,), bool), one), index[0])
                one = {**one, **results}
            grads, after = self.rule.close(carry, folded, one, weights, index[0])
            if leaving is None or product.node.primitive is GRADIENT:
                leaving = after
            solved[product] = self.results(product, grads)
        return solved, leaving
