# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Everything but the simulation, for all steps of a window together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from traceops.compiler.downstream import unroll_of
from traceops.compiler.jaxpr import backward_slice, part
from traceops.compiler.partition import StepPartition, is_expensive
from traceops.compiler.simulation import Simulate
from traceops.compiler.step_sums import StepSums

__all__ = ['Recomputed', 'WindowValues', 'recompute', 'restore', 'run_downstream']


@dataclasses.dataclass(frozen=True)
class WindowValues:
    """Inputs of the recomputation, stacked over steps.

    Attributes
    ----------
    stacks : dict of variables to arrays, ``[T, ...]``
        Slices, residuals, downstream states, and carried values before each step.
    earlier : dict of variables to pairs of arrays
        Of carried values before a step: the stack after each step, and the first value.
    last : dict of int to array
        Carried outputs that are not in the core, after the last step.
    """

    stacks: dict[Any, Any]
    earlier: dict[Any, tuple[Any, Any]]
    last: dict[int, Any]

    def enter(self, left: dict[Any, Any], first: dict[Any, Any]) -> None:
        """Add carried values before each step: after the step before, or ``first``."""
        for v_in, v_out in left.items():
            after, start = (a.astype(v_in.aval.dtype) for a in (self.stacks[v_out], first[v_in]))
            self.earlier[v_in] = after, start
            self.stacks[v_in] = jnp.concatenate([start[None], after[:-1]])


@dataclasses.dataclass(frozen=True)
class Recomputed:
    """Results of :func:`recompute`.

    Attributes
    ----------
    stacked, sums : list of arrays
        The stacked outputs, ``[T, ...]``, other than the later ones; and the summed ones.
    slices, earlier : list
        Operands of ``later``: arrays ``[T, ...]`` that are sliced, then pairs of an array that is
        read one step earlier and the value before its first.
    later : callable
        ``slices of one step -> the later outputs``.
    """

    stacked: list[Any]
    sums: list[Any]
    slices: list[Any]
    earlier: list[tuple[Any, Any]]
    later: Callable[[Sequence[Any]], list[Any]]

    def backward(self, fold_step: Callable[[Any, list[Any]], Any], carry: Any, steps: int) -> Any:
        """Scan ``fold_step(carry, later outputs)`` from the last step to the first."""
        def step(carry: Any, given: Any) -> Any:
            t, slices = given
            # indexed in place: a shifted copy would be one more array to write and read
            before = [jnp.where(t == 0, first, lax.dynamic_index_in_dim(
                after, jnp.maximum(t - 1, 0), keepdims=False)) for after, first in self.earlier]
            return fold_step(carry, self.later([*slices, *before]))

        return lax.scan(step, carry, (jnp.arange(steps), self.slices), reverse=True)


def run_downstream(partition: StepPartition, constant: Sequence[Any], slices: Sequence[Any],
                   residuals: Sequence[Any], first: Sequence[Any],
                   simulate: Simulate | None = None) -> WindowValues:
    """The downstream states from ``slices`` and ``residuals``, ``[T, ...]``, and the counters.

    ``first``: the carried inputs of the first step, all of them; ``simulate`` runs the loops.
    """
    start = dict(zip(partition.entering, first, strict=True))
    window_values = _values((*partition.slices, *partition.residuals), (*slices, *residuals))
    window_values.enter(partition.entered, _first(partition, constant, start))
    step_sums = _step_sums(partition)
    for group in partition.downstream:
        window_values.last.update(
            _run_group(partition, group, constant, window_values, start, step_sums, simulate))
    window_values.last.update(_counted(partition, constant, first, slices[0].shape[0]))
    return window_values


def restore(partition: StepPartition, constant: Sequence[Any], slices: Sequence[Any],
            recorded: Sequence[Any], first: Sequence[Any]) -> WindowValues:
    """As :func:`run_downstream`, where the downstream states were recorded too."""
    enter, leave = partition.entering, partition.leaving
    window_values = _values((*partition.slices, *partition.recorded), (*slices, *recorded))
    of_downstream = {enter[i]: leave[i] for group in partition.downstream for i in group}
    window_values.enter({**partition.entered, **of_downstream},
                        _first(partition, constant, dict(zip(enter, first, strict=True))))
    return window_values


def recompute(partition: StepPartition, constant: Sequence[Any], window_values: WindowValues,
              later: Sequence[int] = ()) -> Recomputed:
    """Everything else, for all steps together.

    ``later``: stacked outputs that are finished a step at a time, by cheap operations on
    expensive intermediate values that are computed here. A sum over steps of a product (the
    gradient of a plain weight) becomes one product that contracts the steps too: no array of
    steps x weights appears.
    """
    step_sums, stacks = _step_sums(partition), window_values.stacks
    between, afterwards, needed = _between(partition, partition.outputs(later), stacks)
    now = partition.outputs(i for i in partition.stacked if i not in later)
    wanted = list(dict.fromkeys([*now, *step_sums.needed, *between]))
    same = partition.same(
        constant, [*step_sums.fixed, *(v for v in wanted if not step_sums.vary(v))])
    _make(partition, constant, stacks, [v for v in wanted if v not in same])

    given = [v for v in stacks if v in needed]
    earlier = [v for v in given if v in window_values.earlier]
    given = [v for v in given if v not in window_values.earlier]
    run_later = part(partition.closed, [*partition.constants, *same, *given, *earlier],
                     partition.outputs(later), afterwards)
    return Recomputed([stacks[v] for v in now],
                      [step_sums.of(v, stacks, same) for v in partition.outputs(partition.summed)],
                      [stacks[v] for v in given], [window_values.earlier[v] for v in earlier],
                      lambda slices: run_later(*constant, *same.values(), *slices))


def _run_group(partition: StepPartition, group: Sequence[int], constant: Sequence[Any],
               window_values: WindowValues, first: dict[Any, Any],
               step_sums: StepSums, simulate: Simulate | None) -> dict[int, Any]:
    """Add stacks of a group's states before and after each step; return their last values."""
    stacks = window_values.stacks
    enter, leave = ([a[i] for i in group] for a in (partition.entering, partition.leaving))
    between, eqns, needed = _between(partition, leave, [*stacks, *enter])
    same = partition.same(constant, [v for v in between if not step_sums.vary(v)])
    _make(partition, constant, stacks, [v for v in between if v not in same])
    given = [v for v in stacks if v in needed]
    run = part(partition.closed, [*partition.constants, *same, *enter, *given], leave, eqns)

    def step(constants: Any, slices: Any, states: Any) -> Any:
        new = run(*constants, *states, *slices)
        new = [jnp.asarray(a, v.aval.dtype) for a, v in zip(new, enter, strict=True)]
        return new, new

    start = [jnp.asarray(first[v], v.aval.dtype) for v in enter]
    slices = [stacks[v] for v in given]
    size = sum(v.aval.size for v in enter)
    unroll = unroll_of(len(eqns), size, slices[0].shape[0], partition.unroll)
    fixed = [*constant, *same.values()]
    if simulate is not None:
        last, after = simulate(step, fixed, slices, start, unroll, downstream=True)
    else:
        last, after = lax.scan(
            lambda states, now: step(fixed, now, states), start, slices, unroll=unroll)
    stacks.update(zip(leave, after, strict=True))
    window_values.enter(dict(zip(enter, leave, strict=True)), first)
    return dict(zip(group, last, strict=True))


def _counted(partition: StepPartition, constant: Sequence[Any], first: Sequence[Any],
             steps: int) -> dict[int, Any]:
    """The counters after so many steps, by number."""
    leave, enter = ([a[i] for i in partition.counting]
                    for a in (partition.leaving, partition.entering))
    eqns, _ = backward_slice(partition.closed.jaxpr, leave)
    after = part(partition.closed, [*partition.constants, *enter], leave, eqns)(
        *constant, *(first[i] for i in partition.counting))
    return {i: a + (steps - 1) for i, a in zip(partition.counting, after, strict=True)}


def _first(partition: StepPartition, constant: Sequence[Any],
           start: dict[Any, Any]) -> dict[Any, Any]:
    """The carried inputs of the first step, and values computed from them."""
    made = [v for v in partition.entered if v not in start]
    eqns, _ = backward_slice(partition.closed.jaxpr, made)
    values = part(partition.closed, [*partition.constants, *start], made, eqns)(
        *constant, *start.values())
    return {**start, **dict(zip(made, values, strict=True))}


def _values(variables: Sequence[Any], stacks: Sequence[Any]) -> WindowValues:
    return WindowValues(dict(zip(variables, stacks, strict=True)), {}, {})


def _step_sums(partition: StepPartition) -> StepSums:
    varying = [*partition.inputs(partition.varying), *partition.residuals, *partition.entered]
    return StepSums(partition.recomputed, varying, partition.outputs(partition.summed))


def _make(partition: StepPartition, constant: Sequence[Any], stacks: dict[Any, Any],
          wanted: Sequence[Any]) -> None:
    """Add stacks of the ``wanted`` variables, for all steps together."""
    eqns, _ = backward_slice(partition.closed.jaxpr, wanted, given=set(stacks))
    run = part(partition.closed, [*partition.constants, *stacks], wanted, eqns)
    made = jax.vmap(lambda *step: run(*constant, *step))(*stacks.values())
    stacks.update(zip(wanted, made, strict=True))


def _between(partition: StepPartition, later: Sequence[Any],
             given: Iterable[Any]) -> tuple[list[Any], list[Any], set[Any]]:
    """Where the computation of the ``later`` outputs is cut.

    Returns the values to compute for all steps together (results of expensive equations, and
    their operands, which have to be arrays anyway), the equations that remain for later, and
    the variables that these read.
    """
    expensive = {v for e in partition.recomputed if is_expensive(e) for v in e.outvars}
    stop = expensive | set(given)
    made, _ = backward_slice(partition.closed.jaxpr, later, given=set(given))
    stop |= {v for e in made if is_expensive(e) for v in e.invars if not isinstance(v, Literal)}
    eqns, needed = backward_slice(partition.closed.jaxpr, later, given=stop)
    produced = (v for e in partition.recomputed for v in e.outvars)
    return [v for v in produced if v in stop and v in needed and v not in given], eqns, needed
