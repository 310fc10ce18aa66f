# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Which gradients of a loop can wait until after it.

A learner's gradients can when the loop does nothing with them but add them up: every use leads
through operations that are linear, and the same at every step (up to a factor that scales a
whole step or lane, which the learning signal takes over), into a carry that is only added to.
Where none is taken, the trace alone waits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from traceops import reasons
from traceops.compiler.jaxpr import CALLBACKS, effects_of
from traceops.engine.step import GRADIENT, PREVIOUS, UPDATE, step_of
from traceops.loops.body import SUMS, Body, owners_in_params
from traceops.loops.flat import Flat, Node, Value
from traceops.reasons import Reason

__all__ = ['NOWHERE', 'Analysis', 'Learner', 'Product', 'Scale']

#: Linear in their only operand.
_UNARY = frozenset('broadcast_in_dim convert_element_type copy copy_p expand_dims neg reduce_sum '
                   'reshape rev slice squeeze stop_gradient transpose'.split())
#: What may be done to the gradients of single lanes before they are added up.
_PER_LANE = frozenset('convert_element_type copy copy_p neg stop_gradient'.split())
#: Factors of a step: ``('mul' or 'div', value)``, each a scalar or one number per lane.
Scale = tuple[tuple[str, Value], ...]
#: A reason, once it is known what for: ``(what=...)``.
_Block = Callable[..., Reason]


@dataclasses.dataclass(frozen=True)
class _Flow:
    """How a gradient arrives at a value: scaled by what, and still per lane or summed."""

    source: Value
    scale: Scale
    per_lane: bool


_Flows = frozenset[_Flow]
NOWHERE: _Flows = frozenset()


@dataclasses.dataclass(frozen=True)
class Product:
    """A gradient node whose results are wanted with a scale."""

    node: Node
    scale: Scale


@dataclasses.dataclass(frozen=True)
class Learner:
    """What one learner does in one step of the loop; positions are those of carries.

    Attributes
    ----------
    reason : Reason or None
        Why its gradients cannot wait; ``None``: they can.
    trace, filters : tuple of int
        Carries that hold the trace and its filters.
    forward : bool
        No gradient is taken: the trace alone waits.
    """

    owner: Any
    reason: Reason | None = None
    update: Node | None = None
    lanes: bool = False
    trace: tuple[int, ...] = ()
    filters: tuple[int, ...] = ()
    products: tuple[Product, ...] = ()
    forward: bool = False


class _Refused(Exception):
    """The loop has to do something that cannot wait."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Analysis(Body):
    """A loop's body, and which of its learners' gradients can wait.

    Attributes
    ----------
    learners : list of Learner
        Those that take a step in it.
    """

    def __init__(self, flat: Flat, carries: int) -> None:
        super().__init__(flat, carries)
        self.flows: dict[Value, _Flows] = {}
        self.blocked: dict[Value, _Block] = {}
        #: scalings that the learning signal takes over
        self.factors: dict[Node, tuple[str, Value]] = {}
        #: carry -> the values added to it that gradients have part in, with their sign
        self.sinks: dict[int, list[tuple[Value, int]]] = {}
        self._follow()
        owners = {id(s.owner): s.owner for s in map(step_of, self.steps)
                  if s is not None and s.owner is not None}
        self.learners = [self._learner(owner) for owner in owners.values()]
        for node in flat.nodes:                 # loops inside are looked at on their own
            if node.name != 'scan':
                self.learners += [Learner(owner, reasons.INSIDE(name=node.name))
                                  for owner, _ in owners_in_params(node.params)]

    @property
    def deferred(self) -> list[Learner]:
        """The learners whose gradients can wait."""
        return [one for one in self.learners if not one.reason]

    @cached_property
    def steps(self) -> list[Node]:
        return [n for n in self.flat.nodes if step_of(n) is not None]

    # -- following gradients -----------------------------------------------------------------

    def _follow(self) -> None:
        for node in self.flat.nodes:
            if node.primitive in (GRADIENT, PREVIOUS):
                step = node.params['step']
                grads = node.outputs[:len(node.outputs) - step.trees['filters'].num_leaves] \
                    if node.primitive is GRADIENT else node.outputs
                for v in grads:
                    self.flows[v] = frozenset([_Flow(v, (), bool(node.params['lanes']))])
            incoming = [self.flows.get(v, NOWHERE) for v in node.inputs]
            if any(incoming):
                self._through(node, incoming)
        for i, v in enumerate(self.flat.outputs):
            self._block(self.flows.get(v, NOWHERE),
                        self._why_no_sum(i) if i < self.carries
                        else reasons.RETURNED)

    def _why_no_sum(self, carry: int) -> _Block:
        """Why a carry, in which gradients end, is not one that is only added to."""
        sums = [n for n in self.uses.get(self.entering[carry], ()) if n.name in SUMS]
        if not sums:
            return reasons.REPLACED
        for v in (self.entering[carry], self.leaving[carry]):
            for node in self.uses.get(v, ()):
                if node not in sums:
                    return partial(reasons.SUM_READ, by=_named(node))
        return reasons.SUM_SHARED

    def _block(self, flows: Iterable[_Flow], reason: _Block) -> None:
        for flow in flows:
            self.blocked.setdefault(flow.source, reason)

    def _through(self, node: Node, incoming: list[_Flows]) -> None:
        if node in self.links:
            carry, side, sign = self.links[node]
            self._block((flow for flow in self.flows.get(side, NOWHERE) if flow.per_lane),
                        reasons.LANE_BY_LANE)
            self.sinks.setdefault(carry, []).append((side, sign))
            return
        out = self._image(node, incoming)
        if out is None:
            self._block(frozenset().union(*incoming), partial(reasons.READ, by=_named(node)))
            return
        self.flows[node.outputs[0]] = out

    def _image(self, node: Node, incoming: list[_Flows]) -> _Flows | None:
        """Flows of the result; ``None`` of what is not linear or not the same at every step."""
        name, everything = node.name, frozenset().union(*incoming)
        per_lane = any(flow.per_lane for flow in everything)
        if name in SUMS or (name == 'concatenate' and not per_lane):
            return everything
        place = next(i for i, flows in enumerate(incoming) if flows)
        if sum(map(bool, incoming)) > 1:
            return None
        if name in _UNARY and jnp.issubdtype(node.outputs[0].aval.dtype, jnp.inexact):
            if not per_lane or name in _PER_LANE:
                return everything
            if name == 'reduce_sum' and 0 in node.params['axes']:
                return frozenset(dataclasses.replace(f, per_lane=False) for f in everything)
        elif name == 'mul' or (name == 'div' and place == 0):
            return self._scaled(node, everything, node.inputs[1 - place], per_lane)
        elif name == 'dot_general' and not per_lane and self.is_invariant(node.inputs[1 - place]):
            return everything
        return None

    def _scaled(self, node: Node, flows: _Flows, by: Value, per_lane: bool) -> _Flows | None:
        if not per_lane and self.is_invariant(by):
            return flows                        # applied once, after the loop
        scalar = self._scalar(by, per_lane)
        if scalar is None:
            return None
        self.factors[node] = (node.name, scalar)
        return frozenset(dataclasses.replace(f, scale=(*f.scale, (node.name, scalar)))
                         for f in flows)

    def _scalar(self, v: Value, per_lane: bool) -> Value | None:
        """The number (or, of lanes, the numbers) that a factor repeats."""
        def single(v: Value) -> bool:
            shape = v.aval.shape
            return math.prod(shape) == 1 or (per_lane and math.prod(shape) == shape[0])

        while not single(v):
            node = self.producer.get(v)
            if node is None or node.name not in ('broadcast_in_dim', 'reshape', 'expand_dims'):
                return None
            before = node.inputs[0]
            if math.prod(before.aval.shape) != 1 and not (
                    per_lane and before.aval.shape[0] == v.aval.shape[0]
                    and (node.name == 'reshape' or _leads(node))):
                return None
            v = before
        return v

    # -- a learner as a whole ----------------------------------------------------------------

    def _learner(self, owner: Any) -> Learner:
        try:
            return self._checked(owner)
        except _Refused as why:
            return Learner(owner, why.reason)

    def _checked(self, owner: Any) -> Learner:
        for name in (name for node in self.flat.nodes for name in effects_of(node)):
            if name not in CALLBACKS:
                raise _Refused(reasons.LOOP_EFFECT(name=name))
        steps = [n for n in self.steps if step_of(n).owner is owner]  # type: ignore[union-attr]
        updates = [n for n in steps if n.primitive is UPDATE]
        grads = [n for n in steps if n.primitive is not UPDATE]
        if len(updates) != 1:           # of several steps at once the gradient alone is a node
            raise _Refused(reasons.STEPS(count=len(updates)) if updates
                           else reasons.SEVERAL_STEPS())
        update = updates[0]
        if len(update.params['lanes']) > 1 or any(
                len(n.params['lanes']) != len(update.params['lanes']) for n in grads):
            raise _Refused(reasons.SEVERAL_VMAPS())
        for node in steps:
            for mapped in node.params['lanes']:
                parts = node.params['step'].split(mapped)
                if any(parts['weights']) or any(parts.get('index', ())):
                    raise _Refused(reasons.WEIGHTS_IN_LANES())
        trace = self._carried_trace(update, grads)
        filters = self._carried_filters(grads)
        for node in steps:
            weights = node.params['step'].split(node.inputs)['weights']
            if not all(map(self.is_invariant, weights)):
                raise _Refused(reasons.WEIGHTS_CHANGE())
        products: dict[Product, None] = {}
        used = set()
        for sinks in self.sinks.values():
            for side, _ in sinks:
                for flow in self.flows.get(side, NOWHERE):
                    if self.producer[flow.source] in grads:
                        used.add(flow.source)
                        products[Product(self.producer[flow.source], flow.scale)] = None
        for node in grads:
            for i, v in enumerate(node.outputs):
                if v in self.blocked:
                    raise _Refused(self.blocked[v](what=_label(node, i)))
        if grads and not used:
            raise _Refused(reasons.NO_SUM())
        return Learner(owner, None, update, bool(update.params['lanes']), trace, filters,
                       tuple(products), forward=not grads)

    def _carried_trace(self, update: Node, grads: Sequence[Node]) -> tuple[int, ...]:
        step = update.params['step']
        mapped = step.split(update.params['lanes'][0])['trace'] if update.params['lanes'] else [
            True] * step.trees['trace'].num_leaves
        places = []
        for old, new, m in zip(step.split(update.inputs)['trace'], update.outputs, mapped,
                               strict=True):
            place = self.position.get(old)
            if place is None or self.leaving[place] is not new or not m:
                raise _Refused(reasons.TRACE_NOT_CARRIED())
            places.append(place)
            self._only(old, [update, *(n for n in grads if n.primitive is PREVIOUS)])
            self._only(new, [n for n in grads if n.primitive is GRADIENT])
            if self.flat.outputs.count(new) != 1 or old in self.results:
                raise _Refused(reasons.TRACE_RETURNED())
        for node in grads:
            there = node.params['step'].split(node.inputs)['trace']
            expected = update.outputs if node.primitive is GRADIENT else [
                self.entering[i] for i in places]
            if any(a is not b for a, b in zip(there, expected, strict=True)):
                raise _Refused(reasons.TRACE_OTHER())
        return tuple(places)

    def _only(self, value: Value, users: Sequence[Node]) -> None:
        for node in self.uses.get(value, []):
            if not any(node is u for u in users):
                raise _Refused(reasons.TRACE_READ(by=_named(node)))

    def _carried_filters(self, grads: Sequence[Node]) -> tuple[int, ...]:
        main = [n for n in grads if n.primitive is GRADIENT]
        count = max((n.params['step'].trees['filters'].num_leaves for n in grads), default=0)
        if not count:
            return ()
        if len(main) != 1:
            raise _Refused(reasons.FILTER_STEPS(count=len(main)))
        old = main[0].params['step'].split(main[0].inputs)['filters']
        places = []
        for v, new in zip(old, main[0].outputs[len(main[0].outputs) - count:], strict=True):
            place = self.position.get(v)
            if place is None or self.leaving[place] is not new or v in self.results:
                raise _Refused(reasons.FILTER_NOT_CARRIED())
            self._only(v, grads)
            self._only(new, [])
            places.append(place)
        return tuple(places)


def _named(node: Node) -> str:
    """A node by its name and, if it is known for effects, by theirs."""
    inside = [name for name in effects_of(node) if name != node.name]
    return f'`{node.name}`' + f' with `{"`, `".join(inside)}`' * bool(inside)


def _label(node: Node, output: int) -> str:
    tree = node.params['step'].result
    example = tree.unflatten(range(tree.num_leaves))
    grads = example[0] if node.primitive is GRADIENT else example
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        if leaf == output:
            name = '.'.join(str(part) for key in path[:1] for part in key.key)
            rest = [k.key for k in path[1:] if isinstance(getattr(k, 'key', None), str)]
            return f'gradient of {".".join([name, *rest])}'
    return 'its trace filter'


def _leads(node: Node) -> bool:
    """Whether the first axis of the operand is the first axis of the result."""
    kept = node.params.get('broadcast_dimensions', ())
    return bool(node.name == 'expand_dims' or (len(kept) and kept[0] == 0))
