# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A learner in a loop whose gradients wait: its step's factors, and a rule that closes a window."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from traceops.compiler.shared_signal import SharedSignal
from traceops.engine.step import GRADIENT
from traceops.host import upstream
from traceops.host.recorder import split_states
from traceops.host.relations import stack_states
from traceops.host.rules import make_rule
from traceops.loops.analysis import Learner, Product
from traceops.loops.flat import Value, read

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


class Deferred:
    """One learner of the loop; see :class:`traceops.loops.analysis.Learner`."""

    def __init__(self, found: Learner) -> None:
        assert found.update is not None
        self.found, self.update, self.products = found, found.update, found.products
        self.settings = found.owner.traceops_settings
        self.factorised = isinstance(found.owner, upstream.IODimVjpAlgorithm)
        self.learner: Any = found.owner if self.factorised else _InLoop(found.owner)
        rule_of: Any = make_rule
        self.rule = rule_of(self.learner, found.lanes)
        self.rule.events = True     # little of a loop's compile time, much of a short window's
        self.bypass = upstream.has_bypass(found.owner)

    @property
    def reads(self) -> Iterable[Value]:
        """What of the body the record of a step is made of."""
        yield from self.update.inputs[self.update.params['step'].trees['trace'].num_leaves:]
        for product in self.products:
            parts = product.node.params['step'].split(product.node.inputs)
            yield from (*parts['index'], *parts['signal'])
            yield from (v for _, v in product.scale)

    # -- what enters and leaves ----------------------------------------------------------------

    def entering(self, init: Any) -> Any:
        """The rule's carry from the carries of the loop."""
        trace = self._trace_tree.unflatten([init[i] for i in self.found.trace])
        if self.factorised:
            xs, fs = trace
            return {'x': xs, 'f': {k: split_states(v) for k, v in fs.items()}}
        carry = {'trace': trace}
        if self.found.filters:
            carry['filter'] = self._filter_tree.unflatten([init[i] for i in self.found.filters])
        return carry

    def leaving(self, carry: Any) -> dict[int, Any]:
        """The carries of the loop from the rule's."""
        if self.factorised:
            trace: Any = (carry['x'], {k: stack_states(v) for k, v in carry['f'].items()})
        else:
            trace = carry['trace']
        out = dict(zip(self.found.trace, self._trace_tree.flatten_up_to(trace), strict=True))
        if self.found.filters:
            leaves = self._filter_tree.flatten_up_to(carry['filter'])
            out.update(zip(self.found.filters, leaves, strict=True))
        return out

    @property
    def _trace_tree(self) -> Any:
        return self.update.params['step'].trees['trace']

    @property
    def _filter_tree(self) -> Any:
        return next(p.node.params['step'].trees['filters'] for p in self.products)

    # -- step by step ----------------------------------------------------------------------------

    def inner(self, carry: Any) -> Any:
        """What is folded step by step, of each product (backward, nothing is)."""
        return [() if self.rule.backward else self.rule.inner(carry) for _ in self.products]

    def digest(self, inner: Any, env: dict[Value, Any]) -> tuple[Any, Any]:
        """The record of one step."""
        factors = self._factors(env)
        new, records = [], []
        for product, folded in zip(self.products, inner, strict=True):
            parts = product.node.params['step'].split(product.node.inputs)
            index = read(env, parts['index'][0])
            signals = self._signals(product, parts, env)
            record = {**factors, **signals}
            if not self.rule.backward:
                if not self.bypass:     # at hand: paired in the loop, and not recorded
                    record['signal'] = [SharedSignal(s, None) for s in signals['signal']]
                    signals = {'signal': [SharedSignal((), None) for _ in signals['signal']]}
                folded, digested = self.rule.digest(folded, record)
                record = {**digested, **signals}
            new.append(folded)
            records.append((record, index))
        return new, records

    def _factors(self, env: dict[Value, Any]) -> Any:
        node = self.update
        values = [self._in_lanes(read(env, v), m) if v in self._recorded else None
                  for v, m in zip(node.inputs, self._mapped(node), strict=True)]
        operands = node.params['step'].unflatten(values)
        return self.found.owner._recorder.of_step(operands['x'], operands['f'], operands['D'])

    @property
    def _recorded(self) -> set[Value]:
        parts = self.update.params['step'].split(self.update.inputs)
        return {*parts['x'], *parts['f'], *parts['D']}

    def _signals(self, product: Product, parts: Any, env: dict[Value, Any]) -> dict[str, Any]:
        node = product.node
        mapped = node.params['step'].split(self._mapped(node))['signal']
        scaled = [split_states(self._scaled(self._in_lanes(read(env, v), m), product, env))
                  for v, m in zip(parts['signal'], mapped, strict=True)]
        nothing = [tuple(map(jnp.zeros_like, s)) for s in scaled]
        if node.primitive is GRADIENT:
            return {'signal': scaled, **({'bypass': nothing} if self.bypass else {})}
        return {'signal': nothing, 'bypass': scaled}

    @staticmethod
    def _scaled(signal: Any, product: Product, env: dict[Value, Any]) -> Any:
        """The factors of a whole step, or lane, on the signal: the gradient is linear in it."""
        for how, v in product.scale:
            factor = read(env, v)
            factor = factor.reshape(() if factor.size == 1 else (
                factor.size, *(1,) * (signal.ndim - 1))).astype(signal.dtype)
            signal = signal * factor if how == 'mul' else signal / factor
        return signal

    @staticmethod
    def _mapped(node: Any) -> Any:
        lanes = node.params['lanes']
        return lanes[0] if lanes else (True,) * len(node.inputs)

    def _in_lanes(self, value: Any, mapped: bool) -> Any:
        if mapped:
            return value
        trace = self.update.params['step'].split(self.update.inputs)['trace']
        return jnp.broadcast_to(value, (trace[0].aval.shape[0], *value.shape))

    # -- window by window ------------------------------------------------------------------------

    def close(self, carry: Any, inner: Any, records: Any, constant: Callable[[Value], Any]) -> Any:
        """``({product: {result of its node: sum}}, what leaves the window)``."""
        node = self.update
        weights = node.params['step'].unflatten(
            [constant(v) if i >= self._first_weight else None
             for i, v in enumerate(node.inputs)])['weights']
        if not self.factorised:
            self.learner.enter(carry)
        solved, leaving = {}, None
        for product, folded, (record, index) in zip(self.products, inner, records, strict=True):
            if self.rule.backward:
                folded, digested = self.rule.digest_window(carry, record, index[0])
                record = {**record, **digested}
            grads, after = self.rule.close(carry, folded, record, weights, index[0])
            if leaving is None or product.node.primitive is GRADIENT:
                leaving = after
            solved[product] = self._of_node(product.node, grads)
        return solved, leaving

    @property
    def _first_weight(self) -> int:
        step = self.update.params['step']
        return len(self.update.inputs) - step.trees['weights'].num_leaves

    @staticmethod
    def _of_node(node: Any, grads: Any) -> dict[Value, Any]:
        """Gradients of the rule in the order of the node's results."""
        tree = node.params['step'].result
        expected = tree.unflatten(node.outputs)
        expected = expected[0] if node.primitive is GRADIENT else expected
        found = {path: grads[path] for path in expected}
        values, given = jax.tree.flatten(found)
        variables, wanted = jax.tree.flatten(expected)
        if given != wanted:
            raise TypeError(f'the rule gives {given}, the step {wanted}')
        return {v: jnp.asarray(a).astype(v.aval.dtype)
                for v, a in zip(variables, values, strict=True)}
