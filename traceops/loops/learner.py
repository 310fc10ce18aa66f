# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a learner's step primitives read and make, in a loop whose gradients wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from traceops.engine.step import GRADIENT
from traceops.loops.analysis import Learner, Product
from traceops.loops.flat import Value, read

__all__ = ['LearnerInLoop']


class LearnerInLoop:
    """The operands and results of a learner's steps, by name, lanes first."""

    def __init__(self, found: Learner) -> None:
        assert found.update is not None
        self.found, self.update, self.products = found, found.update, found.products

    @property
    def reads(self) -> Iterable[Value]:
        """What of the body the operands are made of, the trace and the filters separately."""
        yield from self.update.inputs[self.update.params['step'].trees['trace'].num_leaves:]
        for product in self.products:
            parts = product.node.params['step'].split(product.node.inputs)
            yield from (*parts['index'], *parts['signal'])
            yield from (v for _, v in product.scale)

    # -- what enters and leaves ------------------------------------------------------------------

    def carried(self, init: Any) -> tuple[Any, Any]:
        """The trace and its filters, of the carries of the loop."""
        trace = self._trace_tree.unflatten([init[i] for i in self.found.trace])
        if not self.found.filters:
            return trace, None
        return trace, self._filter_tree.unflatten([init[i] for i in self.found.filters])

    def carries(self, trace: Any, filters: Any) -> dict[int, Any]:
        """The carries of the loop that hold them."""
        out = dict(zip(self.found.trace, self._trace_tree.flatten_up_to(trace), strict=True))
        if self.found.filters:
            leaves = self._filter_tree.flatten_up_to(filters)
            out.update(zip(self.found.filters, leaves, strict=True))
        return out

    @property
    def _trace_tree(self) -> Any:
        return self.update.params['step'].trees['trace']

    @property
    def _filter_tree(self) -> Any:
        return next(p.node.params['step'].trees['filters'] for p in self.products)

    # -- of a step -------------------------------------------------------------------------------

    def factors(self, env: dict[Value, Any]) -> dict[str, Any]:
        """Inputs ``x``, factors ``f`` and Jacobians ``D`` of a step."""
        node = self.update
        values = [self._in_lanes(read(env, v), m) if v in self._factors else None
                  for v, m in zip(node.inputs, _mapped(node), strict=True)]
        return node.params['step'].unflatten(values)

    @cached_property
    def _factors(self) -> set[Value]:
        parts = self.update.params['step'].split(self.update.inputs)
        return {*parts['x'], *parts['f'], *parts['D']}

    def index(self, product: Product, env: dict[Value, Any]) -> Any:
        """The running index of a gradient."""
        (index,) = product.node.params['step'].split(product.node.inputs)['index']
        return read(env, index)

    def signals(self, product: Product, env: dict[Value, Any]) -> list[Any]:
        """The learning signal of each hidden group, with the scale of the gradient on it."""
        step = product.node.params['step']
        signals = step.split(product.node.inputs)['signal']
        mapped = step.split(_mapped(product.node))['signal']
        return [_scaled(self._in_lanes(read(env, v), m), product, env)
                for v, m in zip(signals, mapped, strict=True)]

    def _in_lanes(self, value: Any, mapped: bool) -> Any:
        if mapped:
            return value
        trace = self.update.params['step'].split(self.update.inputs)['trace']
        return jnp.broadcast_to(value, (trace[0].aval.shape[0], *value.shape))

    # -- of a window -----------------------------------------------------------------------------

    def weights(self, constant: Callable[[Value], Any]) -> Any:
        """The weights, which are the same at every step."""
        node = self.update
        step = node.params['step']
        first = len(node.inputs) - step.trees['weights'].num_leaves
        return step.unflatten([constant(v) if i >= first else None
                               for i, v in enumerate(node.inputs)])['weights']

    @staticmethod
    def results(product: Product, grads: Any) -> dict[Value, Any]:
        """Gradients, ``{path: gradient}``, as the results of their node."""
        node = product.node
        expected = node.params['step'].result.unflatten(node.outputs)
        expected = expected[0] if node.primitive is GRADIENT else expected
        found = {path: grads[path] for path in expected}
        values, given = jax.tree.flatten(found)
        variables, wanted = jax.tree.flatten(expected)
        if given != wanted:
            raise TypeError(f'the rule gives {given}, the step {wanted}')
        return {v: jnp.asarray(a).astype(v.aval.dtype)
                for v, a in zip(variables, values, strict=True)}


def _mapped(node: Any) -> Any:
    lanes = node.params['lanes']
    return lanes[0] if lanes else (True,) * len(node.inputs)


def _scaled(signal: Any, product: Product, env: dict[Value, Any]) -> Any:
    """The factors of a whole step, or lane, on the signal: the gradient is linear in it."""
    for how, v in product.scale:
        factor = read(env, v)
        factor = factor.reshape(() if factor.size == 1 else (
            factor.size, *(1,) * (signal.ndim - 1))).astype(signal.dtype)
        signal = signal * factor if how == 'mul' else signal / factor
    return signal
