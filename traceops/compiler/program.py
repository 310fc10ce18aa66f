# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A step function as a pure program: states in, states out, and its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops import reasons
from traceops.compiler.constants import taken_out
from traceops.compiler.jaxpr import (
    CALLBACKS,
    effects_of,
    inlined,
    is_zero,
    narrowed,
    producers,
    value_if_constant,
)
from traceops.compiler.opened import opened
from traceops.compiler.partition import StepPartition, is_expensive, partition_step
from traceops.compiler.recompute import WindowValues, recompute, restore, run_downstream
from traceops.compiler.shared_signal import SharedSignal, shared_signals
from traceops.compiler.simulation import Simulate, advance, products_of, simulate, simulated
from traceops.compiler.trace import Traced, places_of, trace
from traceops.compiler.types import typed
from traceops.reasons import Reason

__all__ = ['Fold', 'StepProgram', 'UnknownEffectError', 'trace_step', 'traced_step']


class UnknownEffectError(Exception):
    """A step does something that a loop over windows cannot do as often and in order."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Fold:
    """A fold over the record of a window, a step at a time.

    Attributes
    ----------
    carry : pytree
        Initial value.
    step : callable
        ``(carry, outputs of one step) -> (carry, results)``.
    backward : bool
        ``True``: from the last step to the first, after the simulation, over the outputs in
        :attr:`StepProgram.invariant`. ``False``: over the tape, inside the loop that simulates.
    """

    carry: Any
    step: Callable[..., Any]
    backward: bool = False


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """One step, traced once.

    The step returns a dict: ``'sum'`` adds up over the steps, everything else is stacked.
    States that it writes are carried from step to step, except the *tape*, whose values are
    stacked under ``'tape'``.

    Attributes
    ----------
    count : int or None
        How much the step advances the counter state: the engine needs 1; ``None`` if that
        cannot be determined.
    record_bytes, ahead_bytes : int
        Bytes that one step adds to the record, and to the residuals it is recomputed from.
    fixed_bytes : int
        Bytes of what a call computes before its windows: weights in another form, and constants.
    before, after : tuple of pytrees of avals
        Types of the carried states, as they enter the first step and as they leave the last.
    types : dict
        Types of what the step returns, in its structure; of ``'sum'`` as one step adds it.
    simulate : callable, optional
        ``(step, constants, slices, states, unroll) -> (states, kept)``, lists: runs the loop that
        only simulates. Without it, ``jax.lax.scan`` does.
    compute_once : callable, optional
        ``(inputs of the step) -> values``: further inputs, the same at every step (see
        :mod:`traceops.compiler.constants`).
    computed : tuple of arrays, optional
        These values, where :meth:`with_constants` computed them.
    """

    partition: StepPartition
    states: tuple[Any, ...]
    carried: tuple[int, ...]
    summed: tuple[int, ...]
    places: tuple[int, ...]
    invariant: frozenset[int]
    sum_avals: tuple[Any, ...]
    out_tree: Any
    slices: int
    count: int | None
    record_bytes: int
    ahead_bytes: int
    fixed_bytes: int
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    types: dict[str, Any]
    simulate: Simulate | None = None
    compute_once: Callable[..., list[Any]] | None = None
    computed: tuple[Any, ...] | None = None

    def with_constants(self) -> StepProgram:
        """The program for all windows of a call: what is the same in each is computed here."""
        if self.compute_once is None:
            return self
        return dataclasses.replace(self, computed=tuple(self._computed()))

    def _computed(self) -> Sequence[Any]:
        if self.computed is not None or self.compute_once is None:
            return self.computed or ()
        leaves = jax.tree.leaves([s.value for s in self.states])
        return self.compute_once(*[None] * self.slices, *leaves)

    def initial(self) -> tuple[Any, Any]:
        """Current values of the carried states, and zeros for the sums."""
        states = tuple(jax.tree.map(typed, self.states[i].value, like)
                       for i, like in zip(self.carried, self.before, strict=True))
        return states, tuple(jnp.zeros(a.shape, a.dtype) for a in self.sum_avals)

    def by_id(self, states: Any) -> dict[int, Any]:
        """Carried values by the identity of their state."""
        return {id(self.states[i]): v for i, v in zip(self.carried, states, strict=True)}

    def store(self, states: Any) -> None:
        """Write carried values back into their states."""
        for i, value, like in zip(self.carried, states, self.after, strict=True):
            self.states[i].value = jax.tree.map(typed, value, like)

    def scan(self, states: Any, sums: Any, xs: Any, fold: Fold | None = None,
             recorded: Any = None, impure: Any = None) -> tuple[Any, Any, Any, Any, Any]:
        """Run the step over ``xs``: ``(states, sums, outputs, carry and results of the fold)``.

        The loop over time only simulates; everything else is recomputed from its residuals, for
        all steps together. A ``fold`` gets its outputs a step at a time, and they are ``None``
        among the outputs: a forward fold runs inside the loop, a backward one in a loop after the
        expensive part of the recomputation. Without a fold, loop-invariant parts of the record are
        ``[1, ...]``. With ``recorded`` (of :meth:`ahead`) nothing is simulated, and the given
        states are returned. With ``impure`` (of :meth:`advance`) no effect runs again.
        """
        constant, first = self._constant(), jax.tree.leaves(states)
        slices, carry, folded = jax.tree.leaves(xs), None, None
        steps = slices[0].shape[0]
        same = dict(zip(self.partition.fixed, self.partition.invariants(constant), strict=True))
        back = fold is not None and fold.backward
        if recorded is None:
            core, residuals, carry, folded = self._simulated(
                constant, same, [first[i] for i in self.partition.core], xs,
                None if back else fold, impure)
            window_values = run_downstream(
                self.partition, constant, slices, residuals, first, self.simulate)
            states = self._after(window_values, core, states)
        else:
            window_values = restore(self.partition, constant, slices, recorded, first)
        later = tuple(i for i in self.partition.stacked if i in self.invariant) if back else ()
        recomputed = recompute(self.partition, constant, window_values, later)
        sums = tuple(a + b for a, b in zip(sums, recomputed.sums, strict=True))
        known = dict(zip((i for i in self.partition.stacked if i not in later),
                         recomputed.stacked, strict=True))
        known.update({i: a[None] if i in self.invariant else jnp.broadcast_to(a, (steps, *a.shape))
                      for i, a in self.partition.whole(same).items()})
        if fold is not None and fold.backward:
            def fold_step(carry: Any, outputs: Any) -> Any:
                return fold.step(carry, self._outputs({
                    **self.partition.whole(same), **dict(zip(later, outputs, strict=True))}))

            carry, folded = recomputed.backward(fold_step, fold.carry, steps)
        return states, sums, self._outputs(known), carry, folded

    def ahead(self, states: Any, xs: Any) -> tuple[Any, dict[str, Any]]:
        """The states after ``xs``, and what :meth:`scan` needs to start its recomputation."""
        constant, first = self._constant(), jax.tree.leaves(states)
        core, residuals, *_ = self._simulated(
            constant, {}, [first[i] for i in self.partition.core], xs, None)
        window_values = run_downstream(
            self.partition, constant, jax.tree.leaves(xs), residuals, first, self.simulate)
        return self._after(window_values, core, states), {
            'recorded': [window_values.stacks[v] for v in self.partition.recorded]}

    def _after(self, window_values: WindowValues, core: list[Any], states: Any) -> Any:
        last = {**window_values.last, **dict(zip(self.partition.core, core, strict=True))}
        return _like([last[i] for i in range(len(last))], states)

    def _simulated(self, constant: list[Any], same: dict[int, Any], core: list[Any], xs: Any,
                   fold: Fold | None, impure: Any = None,
                   ) -> tuple[list[Any], list[Any], Any, Any]:
        """The loop over time: ``(core, residuals, carry and results of a forward fold)``."""
        if self.simulate is not None and fold is None:
            core, residuals = simulated(
                self.partition, self.simulate, constant, jax.tree.leaves(xs), core, impure)
            return core, residuals, None, None
        products = products_of(self.partition, constant)

        def step(full: Any, given: Any) -> Any:
            (core, carry), (x, impure) = full, given
            new, in_loop, residuals = simulate(
                self.partition, constant, jax.tree.leaves(x), core, products, impure)
            folded = None
            if fold is not None:
                known = {**self.partition.whole(same),
                         **dict(zip(self.partition.in_loop, in_loop, strict=True))}
                carry, folded = fold.step(carry, self._outputs(known))
            return (_like(new, core), carry), (residuals, folded)

        (core, carry), (residuals, folded) = jax.lax.scan(
            step, (core, () if fold is None else fold.carry), (xs, impure),
            unroll=self.partition.unroll)
        return core, residuals, carry, folded

    def _outputs(self, known: dict[int, Any]) -> Any:
        return self.out_tree.unflatten([known.get(i) for i in self.places])

    def advance(self, states: Any, xs: Any) -> tuple[Any, dict[str, Any]]:
        """The states after ``xs``, and what a second simulation may not do again."""
        constant = self._constant()
        products = products_of(self.partition, constant)

        def body(states: Any, x: Any) -> Any:
            new, impure = advance(
                self.partition, constant, jax.tree.leaves(x), jax.tree.leaves(states), products)
            return _like(new, states), impure

        states, impure = jax.lax.scan(body, states, xs, unroll=self.partition.unroll)
        return states, {'impure': impure}

    def _constant(self) -> list[Any]:
        leaves = [*jax.tree.leaves([s.value for s in self.states]), *self._computed()]
        return [leaves[i - self.slices] for i in self.partition.constant]

    def unflatten_sums(self, sums: Any, like: Any) -> Any:
        """The sums in the structure of ``like``; ``None`` where they are zero by construction."""
        known = dict(zip(self.summed, sums, strict=True))
        leaves, tree = jax.tree.flatten(like)
        total = tree.unflatten([known.get(i, _NOTHING) for i in range(len(leaves))])
        return {k: _filled(total[k], like[k]) for k in like}


class _Nothing:
    """A sum that is zero by construction."""


_NOTHING = _Nothing()


def _filled(tree: Any, like: Any) -> Any:
    leaves = jax.tree.leaves(tree)
    if all(leaf is _NOTHING for leaf in leaves):
        return None
    return jax.tree.map(lambda a, b: jnp.zeros_like(b) if a is _NOTHING else a, tree, like)


def _like(new: Any, old: Any) -> Any:
    """Carried leaves with the dtype that came in: a scan refuses a weak type that changes."""
    leaves, tree = jax.tree.flatten(old)
    return tree.unflatten([jnp.asarray(a, b.dtype) for a, b in zip(new, leaves, strict=True)])


def traced_step(step: Callable[..., Any], xs: tuple[Any, ...], kept: Sequence[Any]) -> Traced:
    """``step`` traced on one slice of ``xs``, for :func:`trace_step`, any number of times.

    ``kept``: the states that are not carried from step to step (the tape and the constants).
    """
    slices = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], jnp.result_type(a),
                                       weak_type=getattr(a, 'weak_type', False)), xs)
    return trace(step, slices, kept)


def trace_step(step: Callable[..., Any] | Traced, xs: tuple[Any, ...], *, tape: Sequence[Any],
               constants: Sequence[Any], counter: Any,
               invariant: Sequence[Any] = (), in_loop: Sequence[Any] = (),
               cpu: bool = False, unroll: int = 1,
               simulate: Simulate | None = None,
               stands_for: Callable[[Any], bool] | None = None) -> StepProgram:
    """Trace ``step`` on one slice of ``xs``; no state changes.

    Parameters
    ----------
    step : callable or Traced
        Called with one slice of each entry of ``xs``; returns a dict with ``'sum'``. Or what
        :func:`traced_step` made of it.
    xs : tuple of pytrees, ``[T, ...]``
    tape : sequence of State
        Written by the step, stacked instead of carried.
    constants : sequence of State
        Read, never carried.
    counter : State
        Advanced by one at every call that is to be counted.
    invariant : sequence of State
        Those of the tape that, like everything returned under ``'record'``, are not repeated over
        steps where they are loop-invariant.
    in_loop : sequence of State
        Those of the tape that are computed inside the loop: the input of a forward fold.
    cpu : bool
        Whether the loop takes products in the form that a CPU is quickest with.
    unroll : int
        Steps in an iteration of the loop, and of the loops of downstream states (for a GPU, where
        an iteration has launches of its own and stores the values of all its steps together).
    simulate : callable, optional
        As in :class:`StepProgram`.
    stands_for : callable, optional
        Whether a primitive stands for a program (see :func:`~traceops.compiler.opened.opened`).
    """
    traced = step if isinstance(step, Traced) else traced_step(step, xs, (*tape, *constants))
    _check_effects(traced.closed.jaxpr)
    states = traced.states
    written = tuple(w and not any(s is c for c in constants)
                    for s, w in zip(states, traced.written, strict=True))
    closed = narrowed(inlined(opened(traced.closed, stands_for)))
    positions, new_positions = jax.tree.map(int, traced.positions), traced.new_positions
    types = jax.tree.map(lambda p: traced.closed.out_avals[p], positions)
    sums, avals = jax.tree.leaves(positions.pop('sum')), jax.tree.leaves(types['sum'])
    made_by = producers(closed.jaxpr)
    summed = tuple(
        i for i, p in enumerate(sums) if not is_zero(made_by, closed.jaxpr.outvars[p]))
    of_tape = [_position(t, states) for t in tape]
    positions['tape'] = tuple(new_positions[i] for i in of_tape)
    carried = tuple(i for i, w in enumerate(written) if w and i not in of_tape)
    carried_out = [p for i in carried for p in jax.tree.leaves(new_positions[i])]
    in_loop = [p for t in in_loop for p in jax.tree.leaves(new_positions[_position(t, states)])]
    if in_loop and set(positions['record']) == {'signal'}:     # a bypass is of another step
        closed, found = shared_signals(
            closed, positions['record']['signal'], [*in_loop, *carried_out], is_expensive)
        positions['record']['signal'] = found
        in_loop += [p for m in found if isinstance(m, SharedSignal) for p in m.scales]
    signals = [p for p in jax.tree.leaves(positions['record']) if p not in in_loop]
    taped = jax.tree.leaves(positions['tape'])
    places, out_tree = jax.tree.flatten(positions)

    n_slices = len(jax.tree.leaves(xs))
    leaves = places_of(states, n_slices)
    counter_at = _position(counter, states)
    (counter_out,) = jax.tree.leaves(new_positions[counter_at])
    count = _count(closed, written[counter_at], leaves[counter_at][0], counter_out)
    varying = [*range(n_slices), *(p for i in carried for p in leaves[i])]
    n_inputs = len(closed.jaxpr.invars)
    closed, compute_once = taken_out(closed, varying, is_expensive)
    partition = partition_step(
        closed, varying, carried=carried_out,
        stacked=[i for i in places if i not in in_loop], summed=[sums[i] for i in summed],
        in_loop=in_loop, counter=counter_out if count == 1 else None, cpu=cpu,
        unroll=unroll)
    return StepProgram(
        partition=partition, states=states, carried=carried, summed=summed,
        places=tuple(places),
        invariant=frozenset(signals) | {p for t in invariant for p in jax.tree.leaves(
            new_positions[_position(t, states)])},
        sum_avals=tuple(avals[i] for i in summed), out_tree=out_tree, slices=n_slices,
        count=count,
        record_bytes=_bytes(
            closed.jaxpr.outvars[i] for i in (*signals, *taped) if i not in partition.fixed),
        ahead_bytes=_bytes(partition.recorded),
        fixed_bytes=_bytes([*partition.copied, *closed.jaxpr.invars[n_inputs:]]),
        before=tuple(traced.before[i] for i in carried),
        after=tuple(traced.after[i] for i in carried), types=types, simulate=simulate,
        compute_once=compute_once)


def _check_effects(jaxpr: Any) -> None:
    for name in (name for eqn in jaxpr.eqns for name in effects_of(eqn)):
        if name not in CALLBACKS:
            raise UnknownEffectError(reasons.EFFECT(name=name))


def _bytes(variables: Iterable[Any]) -> int:
    return sum(v.aval.size * v.aval.dtype.itemsize for v in variables)


def _position(state: Any, states: Sequence[Any]) -> int:
    return next(i for i, s in enumerate(states) if s is state)


def _count(closed: Any, written: bool, place: int, position: int) -> int | None:
    """How much one step adds to the counter, if the program alone determines it."""
    if not written:
        return 0
    aval = closed.jaxpr.invars[place].aval
    value = value_if_constant(closed, position, {place: np.zeros(aval.shape, aval.dtype)})
    if value is None or np.unique(np.asarray(value)).size != 1:
        return None
    return int(np.ravel(np.asarray(value))[0])
