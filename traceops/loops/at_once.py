# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The steps of a window in two phases: a loop that only simulates, then all else of all steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from traceops.compiler.jaxpr import inlined, narrowed
from traceops.compiler.partition import StepPartition, partition_step
from traceops.compiler.recompute import recompute, run_downstream
from traceops.compiler.simulation import Simulate, simulated
from traceops.loops.analysis import Analysis
from traceops.loops.body import SUMS
from traceops.loops.flat import Constant, Value, read
from traceops.loops.rewrite import Kept

__all__ = ['Body', 'StepsAtOnce']

_Env = dict[Value, Any]


@dataclasses.dataclass(frozen=True)
class Body:
    """What is left of a loop's body, as a window of it is asked for it.

    Attributes
    ----------
    live : list of int
        The carries that are left.
    outputs : list of Value
        What is stacked, besides the records.
    reads : list of Value
        What the records are made of.
    records : callable
        ``values of a step -> pytree``.
    """

    analysis: Analysis
    kept: Kept
    live: list[int]
    outputs: list[Value]
    reads: list[Value]
    records: Callable[[_Env], Any]


class StepsAtOnce:
    """Runs windows of a loop; the step is traced and cut in two once.

    A carry that counts is known ahead, and one that is only added to is summed afterwards: neither
    is a state of the simulation.

    Parameters
    ----------
    body : Body
    simulate : callable
        Runs the loop that only simulates (see :class:`traceops.compiler.program.StepProgram`).
    unroll : int
        Steps in an iteration of the loops.
    """

    def __init__(self, body: Body, simulate: Simulate, unroll: int) -> None:
        self.body, self.simulate, self.unroll = body, simulate, unroll
        self.counters: dict[int, list[tuple[Value, int]]] = {}
        self.sums: dict[int, list[tuple[Value, int]]] = {}
        analysis = body.analysis
        for i in body.live:
            sides = [(v, sign) for v, sign in analysis.chains.get(i, {}).values()
                     if v not in body.kept.waits]
            counted = _counted(analysis, i)
            if counted:
                self.counters[i] = counted
            elif jnp.issubdtype(analysis.entering[i].aval.dtype, jnp.inexact) and not all(
                    analysis.is_invariant(v) for v, _ in sides):
                self.sums[i] = sides
        self.carried = [i for i in body.live if i not in self.counters and i not in self.sums]

    def __call__(self, constants: _Env, live: Sequence[Any], xs: Sequence[Any], count: int,
                 constant: Callable[[Value], Any]) -> tuple[list[Any], list[Any], Any]:
        """A window: what is live after it, the outputs ``[T, ...]``, and its records.

        Of the records ``[T, ...]``, what is the same at every step comes once, ``[1, ...]``.
        """
        partition, tree = self._cut
        before = dict(zip(self.body.live, live, strict=True))
        increments = {i: _total(sides, constant, before[i]) for i, sides in self.counters.items()}
        fixed, slices = list(constants.values()), self._slices(before, increments, xs, count)
        first = [before[i] for i in self.carried]
        core, residuals = simulated(
            partition, self.simulate, fixed, slices, [first[i] for i in partition.core])
        values = run_downstream(partition, fixed, slices, residuals, first, self.simulate)
        recomputed = recompute(partition, fixed, values)
        same = partition.whole(dict(zip(partition.fixed, partition.invariants(fixed), strict=True)))
        known = {**dict(zip(partition.stacked, recomputed.stacked, strict=True)),
                 **{i: a[None] for i, a in same.items()}}
        outputs, records = tree.unflatten(
            known[len(self.carried) + i] for i in range(tree.num_leaves))
        last = {**values.last, **dict(zip(partition.core, core, strict=True))}
        after = {**dict(zip(self.carried, (last[i] for i in range(len(first))), strict=True)),
                 **{i: before[i] + count * by for i, by in increments.items()},
                 **{i: before[i] + a for i, a in zip(self.sums, recomputed.sums, strict=True)}}
        return ([after[i].astype(before[i].dtype) for i in self.body.live],
                [jnp.broadcast_to(a, (count, *a.shape[1:])) for a in outputs], records)

    def _slices(self, before: dict[int, Any], increments: dict[int, Any], xs: Sequence[Any],
                count: int) -> list[Any]:
        """What is different at each step, the counters among it."""
        t = jnp.arange(count)
        return [*xs, *(before[i] + jnp.expand_dims(t.astype(by.dtype), range(1, by.ndim + 1)) * by
                       for i, by in increments.items()), t]

    @cached_property
    def _cut(self) -> tuple[StepPartition, Any]:
        """The step in two phases, and the structure of what is stacked of it."""
        analysis, count = self.body.analysis, len(self.body.analysis.entering)
        fixed = [*analysis.flat.constants, *(
            v for v, w in zip(analysis.entering, analysis.leaving, strict=True) if v is w)]
        moving = [*analysis.flat.inputs[count:], *(analysis.entering[i] for i in self.counters)]
        carried = [analysis.entering[i] for i in self.carried]
        sides = [v for sides in self.sums.values() for v, _ in sides]
        leaving = [analysis.leaving[i] for i in self.carried]

        def step(fixed_: Any, moving_: Any, _: Any, carried_: Any) -> Any:
            env = dict(zip((*fixed, *moving, *carried), (*fixed_, *moving_, *carried_),
                           strict=True))
            self.body.kept.run(env, [*leaving, *self.body.outputs, *self.body.reads, *sides], {})
            return ([read(env, v) for v in leaving],
                    ([read(env, v) for v in self.body.outputs], self.body.records(env)),
                    [_total(of, lambda v: read(env, v), analysis.entering[i].aval)
                     for i, of in self.sums.items()])

        def structs(values: Sequence[Value]) -> list[Any]:
            return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in values]

        closed, shapes = jax.make_jaxpr(step, return_shape=True)(
            structs(fixed), structs(moving), jax.ShapeDtypeStruct((), int), structs(carried))
        stacked = jax.tree.structure(shapes[1])
        ends = len(carried), len(carried) + stacked.num_leaves
        return partition_step(
            narrowed(inlined(closed)), range(len(fixed), len(closed.jaxpr.invars)),
            carried=range(ends[0]), stacked=range(*ends),
            summed=range(ends[1], ends[1] + len(self.sums)), unroll=self.unroll), stacked


def _counted(analysis: Analysis, carry: int) -> list[tuple[Value, int]]:
    """What each step adds to a carry of whole numbers, with its sign, where that is always the
    same; nothing where it is not.
    """
    enters, v = analysis.entering[carry], _before_overflow(analysis, analysis.leaving[carry])
    found: list[tuple[Value, int]] = []
    while v is not enters and jnp.issubdtype(v.aval.dtype, jnp.integer):
        node = analysis.producer.get(v)
        if node is None or node.name not in SUMS:
            return []
        a, b = node.inputs
        if node.name != 'sub' and analysis.is_invariant(a):
            a, b = b, a
        if not analysis.is_invariant(b) or a.aval.dtype != enters.aval.dtype \
                or a.aval.shape != enters.aval.shape:
            return []
        found.append((b, -1 if node.name == 'sub' else 1))
        v = a
    return found if v is enters else []


def _before_overflow(analysis: Analysis, v: Value) -> Value:
    """The value that starts again from zero where it is too large (upstream's running index)."""
    node = analysis.producer.get(v)
    if node is not None and node.name == 'stop_gradient':
        return _before_overflow(analysis, node.inputs[0])
    if node is None or node.name != 'select_n':
        return v
    test, zero, kept = analysis.producer.get(node.inputs[0]), *node.inputs[1:3]
    if test is None or test.name != 'ge' or test.inputs[0] is not kept or not all(
            isinstance(a, Constant) and jnp.size(a.value) == 1 and not a.value
            for a in (test.inputs[1], zero)):
        return v
    return kept


def _total(sides: Sequence[tuple[Value, int]], value_of: Callable[[Value], Any],
           like: Any) -> Any:
    """The sum of what is added to a carry, in its shape and dtype."""
    total: Any = None
    for v, sign in sides:
        side = jnp.asarray(value_of(v), like.dtype)
        total = sign * side if total is None and sign < 0 else side if total is None \
            else total + side if sign > 0 else total - side
    return jnp.broadcast_to(total, like.shape)
