# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A loop's body when some of its gradients wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from traceops.compiler.products import Products, takes_another_form
from traceops.engine.step import step_of
from traceops.loops.analysis import NOWHERE, Analysis, Learner, Product, Scale
from traceops.loops.body import SUMS
from traceops.loops.flat import Constant, Node, Value, apply, evaluate, needed, read

__all__ = ['Kept']


class Kept:
    """The body without the waiting gradients, and what happens to their sums afterwards."""

    def __init__(self, analysis: Analysis, learners: Sequence[Learner]) -> None:
        self.analysis = analysis
        self.removed = {n for one in learners for n in analysis.steps
                        if step_of(n).owner is one.owner}  # type: ignore[union-attr]
        sources = {v for n in self.removed for v in n.outputs}
        self.waits = {v for v, flows in analysis.flows.items()
                      if all(f.source in sources for f in flows) and self._only_gradients(v)}

    def _only_gradients(self, value: Value) -> bool:
        """Whether a value is nothing but gradients (no other addend)."""
        node = self.analysis.producer[value]
        if node in self.removed:
            return True
        own = [v for v in node.inputs if self.analysis.flows.get(v)]
        if node.name in SUMS or node.name == 'concatenate':
            return all(v in self.analysis.flows and self._only_gradients(v) for v in node.inputs)
        return all(map(self._only_gradients, own))

    def untouched(self, carry: int) -> bool:
        """Whether nothing is left that the loop adds to a carry."""
        chain = self.analysis.chains.get(carry)
        return chain is not None and all(side in self.waits for side, _ in chain.values())

    def _inputs(self, node: Node) -> list[Value]:
        return [v for v in node.inputs if v not in self.waits]

    def products(self, known: Mapping[Value, Any]) -> list[Node]:
        """Those that the loop takes in another form; ``known``: values of constants."""
        def varies(value: Value) -> bool:
            return not self.analysis.is_invariant(value)

        def is_known(value: Value) -> bool:
            return isinstance(value, Constant) or value in known

        return [n for n in self.analysis.flat.nodes if n not in self.removed
                and takes_another_form(n, n.inputs, varies, is_known)]

    def run(self, env: dict[Value, Any], outputs: Sequence[Value],
            products: Products) -> None:
        """Compute what ``outputs`` need; waiting gradients count as zero."""
        nodes = [n for n in self.analysis.flat.nodes if n not in self.removed
                 and not (n.outputs and self.waits.issuperset(n.outputs))]
        for node in needed(nodes, outputs, self._inputs):
            zero = [v in self.waits for v in node.inputs]
            if not products.keys().isdisjoint(node.outputs):
                operand, product = products[node.outputs[0]]
                env[node.outputs[0]] = product(read(env, operand))
            elif not any(zero):
                evaluate([node], env)
            elif node.name == 'concatenate':
                env[node.outputs[0]] = apply(node, [
                    jnp.zeros(v.aval.shape, v.aval.dtype) if z else read(env, v)
                    for v, z in zip(node.inputs, zero, strict=True)])[0]
            else:                                   # a sum of which one operand waits
                other = read(env, node.inputs[zero.index(False)])
                env[node.outputs[0]] = -other if node.name == 'sub' and zero[0] else other

    def after(self, constant: Callable[[Value], Any], sums: Any) -> dict[int, Any]:
        """What is added to each carry once the sums are known.

        ``sums[product][v]`` is the sum over steps (and lanes) of a gradient node's result.
        """
        total: dict[int, Any] = {}
        for carry, sinks in self.analysis.sinks.items():
            for side, sign in sinks:
                flows = self.analysis.flows.get(side, NOWHERE)
                for scale in dict.fromkeys(f.scale for f in flows):
                    products = {f.source: Product(self.analysis.producer[f.source], scale)
                                for f in flows if f.scale == scale}
                    known = {v: sums[p][v] for v, p in products.items() if p in sums}
                    if known:
                        value = sign * self._image(side, scale, known, constant)
                        total[carry] = total[carry] + value if carry in total else value
        return total

    def _image(self, v: Value, scale: Scale, known: dict[Value, Any],
               constant: Callable[[Value], Any]) -> Any:
        """What the sums make of ``v``, of what arrives there with this scale."""
        node = self.analysis.producer[v]
        if v in known and not scale:
            return known[v][None] if node.params['lanes'] else known[v]
        if node in self.analysis.factors:           # the learning signal has this factor
            scale = scale[:-1]
        operands = [self._image(w, scale, known, constant) if any(
            f.scale == scale and f.source in known
            for f in self.analysis.flows.get(w, NOWHERE)) else None for w in node.inputs]
        present = [a for a in operands if a is not None]
        if node in self.analysis.factors:
            return present[0]
        if node.name in SUMS and len(present) == 1:
            return -present[0] if node.name == 'sub' and operands[0] is None else present[0]
        if node.name == 'concatenate':
            operands = [jnp.zeros(w.aval.shape, w.aval.dtype) if a is None else a
                        for w, a in zip(node.inputs, operands, strict=True)]
        return apply(node, [constant(w) if a is None else a
                            for w, a in zip(node.inputs, operands, strict=True)])[0]

    def constant(self, value: Value, constants: dict[Value, Any]) -> Any:
        """A value that is the same at every step."""
        if not isinstance(value, Constant) and value not in constants:
            fixed = [n for n in self.analysis.flat.nodes
                     if all(v in self.analysis.invariant for v in n.outputs)]
            evaluate(needed(fixed, [value]), constants)
        return read(constants, value)
