# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A step in two phases: what the next step depends on, and everything else.

*Simulate* computes the carried states, and the outputs that are needed inside the loop over time.
*Recompute* computes everything else (losses, learning signals, factors, Jacobians) from the inputs
of the step and from the residuals: the smallest set of values from which it follows without
computing anything expensive twice. Recomputing a step needs no other step, so all steps are
recomputed together, after the loop. States that no other state depends on (downstream states) are
recomputed too, each group in a loop of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, DropVar, Literal

from traceops.compiler.column_blocks import column_blocks_of, product, takes_column_blocks
from traceops.compiler.downstream import downstream_groups, unroll_of
from traceops.compiler.jaxpr import backward_slice, is_pure, part, producers, reached
from traceops.compiler.recompute import Recomputed, WindowValues
from traceops.compiler.residuals import minimum_cut
from traceops.compiler.step_sums import StepSums

__all__ = ['StepPartition', 'is_expensive', 'partition_step']

#: Recomputed rather than stored: one pass over their operands, fused into what reads them.
_CHEAP = frozenset('''
    abs add add_any and broadcast_in_dim ceil clamp concatenate convert_element_type copy copy_p
    cos div eq erf exp exp2 expand_dims expm1 floor ge gt integer_pow iota is_finite le log log1p
    logistic lt max min mul ne neg nextafter not or pad pow real_p rem reshape round rsqrt
    select_n sign sin slice split sqrt square squeeze stack stop_gradient sub tan tanh transpose
    xor
'''.split())

#: Cheap where they reduce over axes of size one alone.
_REDUCTIONS = frozenset('reduce_max reduce_min reduce_prod reduce_sum'.split())


@dataclasses.dataclass(frozen=True)
class StepPartition:
    """A step cut in two; positions are those of the step's inputs and outputs.

    Attributes
    ----------
    varying : tuple of int
        Inputs that differ from step to step: slices of arrays over steps, then what is carried.
        The others are *constant* (loop-invariant).
    carried, in_loop, stacked, fixed, summed : tuple of int
        Outputs that are carried to the next step; that are needed inside the loop; that are
        stacked over steps; those of the last two kinds that are loop-invariant; and outputs that
        are summed over steps.
    residuals : tuple of variables
        What recomputation starts from that differs from step to step, other than slices
        (see :mod:`traceops.compiler.residuals`).
    entered : dict of variables
        Carried inputs that recomputation reads, and values computed from them alone: each with the
        residual that it equals one step later.
    downstream : tuple of tuple of int
        Numbers of the carried outputs that the recomputation computes, group by group, each in a
        loop of its own (see :mod:`traceops.compiler.downstream`).
    counting : tuple of int
        Numbers of carried outputs that count steps and that nothing else reads.
    block_products : tuple of equations
        Products that the loop over time takes in column blocks
        (see :mod:`traceops.compiler.column_blocks`).
    unroll : int
        Steps in an iteration of a loop over time.
    """

    closed: ClosedJaxpr
    varying: tuple[int, ...]
    carried: tuple[int, ...]
    in_loop: tuple[int, ...]
    stacked: tuple[int, ...]
    fixed: tuple[int, ...]
    summed: tuple[int, ...]
    residuals: tuple[Any, ...]
    entered: dict[Any, Any]
    downstream: tuple[tuple[int, ...], ...]
    counting: tuple[int, ...]
    block_products: tuple[Any, ...]
    simulation: tuple[Any, ...]
    recomputed: tuple[Any, ...]
    unroll: int

    @property
    def constant(self) -> tuple[int, ...]:
        """Inputs that are the same at every step."""
        return tuple(i for i in range(len(self.closed.jaxpr.invars)) if i not in self.varying)

    @property
    def core(self) -> tuple[int, ...]:
        """Numbers of the carried outputs that pass on in the loop that simulates."""
        apart = {i for group in (*self.downstream, self.counting) for i in group}
        return tuple(i for i in range(len(self.carried)) if i not in apart)

    @property
    def _slices(self) -> list[Any]:
        return self._in(self.varying[:len(self.varying) - len(self.carried)])

    @property
    def _entering(self) -> list[Any]:
        return self._in(self.varying[len(self.varying) - len(self.carried):])

    @property
    def _leaving(self) -> list[Any]:
        return self._out(self.carried)

    def _in(self, positions: Iterable[int]) -> list[Any]:
        return [self.closed.jaxpr.invars[i] for i in positions]

    def _out(self, positions: Iterable[int]) -> list[Any]:
        return [self.closed.jaxpr.outvars[i] for i in positions]

    def invariants(self, constant: Sequence[Any]) -> list[Any]:
        """The loop-invariant outputs; one that repeats a scalar is returned as that scalar."""
        made_by = producers(self.closed.jaxpr)
        wanted = [_number(made_by, v) for v in self._out(self.fixed)]
        eqns, _ = backward_slice(self.closed.jaxpr, wanted)
        return part(self.closed, self._in(self.constant), wanted, eqns)(*constant)

    def whole(self, once: dict[int, Any]) -> dict[int, Any]:
        """The loop-invariant outputs, broadcast to full shape where they are read."""
        return {i: jnp.broadcast_to(a, self.closed.jaxpr.outvars[i].aval.shape)
                for i, a in once.items()}

    def blocks(self, constant: Sequence[Any]) -> dict[Any, list[Any]]:
        """The column blocks of the weights of each product that is taken in blocks."""
        weights = self._same(constant, [eqn.invars[1] for eqn in self.block_products])
        of = {v: column_blocks_of(value) for v, value in weights.items()}
        return {eqn.outvars[0]: of[eqn.invars[1]] for eqn in self.block_products}

    @property
    def impure(self) -> list[Any]:
        """Results of equations that may run once a step, however often it is simulated: effects,
        callbacks, and generators with a state of their own.
        """
        return [v for e in self.simulation if not is_pure(e)
                for v in e.outvars if not isinstance(v, DropVar)]

    def advance(self, constant: Sequence[Any], slices: Sequence[Any], carried: Sequence[Any],
                blocks: dict[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        """All carried outputs of one step, and its :attr:`impure` values."""
        inputs = self._in((*self.constant, *self.varying))
        out = self._loop(dict(zip(inputs, (*constant, *slices, *carried), strict=True)),
                         [*self._leaving, *self.impure], (), blocks)
        return out[:len(self.carried)], out[len(self.carried):]

    def simulate(self, constant: Sequence[Any], slices: Sequence[Any], core: Sequence[Any],
                 blocks: dict[Any, list[Any]], impure: Sequence[Any] | None = None,
                 ) -> tuple[list[Any], list[Any], list[Any]]:
        """The core and the in-loop outputs of one step, and its residuals.

        With its :attr:`impure` values given, no effect runs.
        """
        inputs = [*self._in(self.constant), *self._slices, *(self._entering[i] for i in self.core)]
        core_out, in_loop = [self._leaving[i] for i in self.core], self._out(self.in_loop)
        env = dict(zip(inputs, (*constant, *slices, *core), strict=True))
        if impure is not None:
            env.update(zip(self.impure, impure, strict=True))
        out = self._loop(env, [*core_out, *in_loop, *self.residuals], self.residuals, blocks,
                         again=impure is not None)
        first, second = len(core_out), len(core_out) + len(in_loop)
        return out[:first], out[first:second], out[second:]

    def _loop(self, env: dict[Any, Any], wanted: Sequence[Any], residuals: Sequence[Any],
              blocks: dict[Any, list[Any]], again: bool = False) -> list[Any]:
        """The values ``wanted`` of one step of the loop over time.

        A barrier after each residual and the states it is computed from makes XLA compute them
        once, before their readers. Without it XLA fuses a residual into each reader (the state
        update, the stored copy) and does the work twice, or updates in place a state that is
        read later, and has to copy it.
        """
        states = [v for v in self._leaving if not isinstance(v, Literal)]
        eqns, _ = backward_slice(self.closed.jaxpr, wanted, set(self.impure) if again else set(),
                                 effects=not again)
        for eqn in eqns:
            if not blocks.keys().isdisjoint(eqn.outvars):
                out = [product(eqn, env[eqn.invars[0]], blocks[eqn.outvars[0]])]
            else:
                read = [v for v in dict.fromkeys(
                    v for v in eqn.invars if not isinstance(v, Literal)) if v in env]
                out = part(self.closed, read, eqn.outvars, [eqn])(*(env[v] for v in read))
            env.update(zip(eqn.outvars, out, strict=True))
            if any(v in residuals for v in eqn.outvars):
                _, behind = backward_slice(self.closed.jaxpr, eqn.outvars, given=set(states))
                once = [v for v in dict.fromkeys((*eqn.outvars, *states))
                        if v in behind and v in env]
                env.update(zip(once, lax.optimization_barrier([env[v] for v in once]),
                               strict=True))
        return part(self.closed, list(env), wanted, ())(*env.values())

    @property
    def recorded(self) -> tuple[Any, ...]:
        """What recomputation needs of every step: the residuals and the downstream states."""
        return (*self.residuals, *(self._leaving[i] for group in self.downstream for i in group))

    def run_downstream(self, constant: Sequence[Any], slices: Sequence[Any],
                       residuals: Sequence[Any], first: Sequence[Any]) -> WindowValues:
        """The downstream states from ``slices`` and ``residuals``, ``[T, ...]``, and the counters.

        ``first``: the carried inputs of the first step, all of them.
        """
        start = dict(zip(self._entering, first, strict=True))
        window_values = WindowValues(
            dict(zip((*self._slices, *self.residuals), (*slices, *residuals), strict=True)), {}, {})
        window_values.enter(self.entered, self._first(constant, start))
        step_sums = self._step_sums()
        for group in self.downstream:
            window_values.last.update(
                self._run_group(group, constant, window_values, start, step_sums))
        window_values.last.update(self._counted(constant, first, slices[0].shape[0]))
        return window_values

    def _counted(self, constant: Sequence[Any], first: Sequence[Any],
                 steps: int) -> dict[int, Any]:
        """The counters after so many steps, by number."""
        leave, enter = ([a[i] for i in self.counting] for a in (self._leaving, self._entering))
        eqns, _ = backward_slice(self.closed.jaxpr, leave)
        after = part(self.closed, [*self._in(self.constant), *enter], leave, eqns)(
            *constant, *(first[i] for i in self.counting))
        return {i: a + (steps - 1) for i, a in zip(self.counting, after, strict=True)}

    def _first(self, constant: Sequence[Any], start: dict[Any, Any]) -> dict[Any, Any]:
        """The carried inputs of the first step, and values computed from them."""
        made = [v for v in self.entered if v not in start]
        eqns, _ = backward_slice(self.closed.jaxpr, made)
        values = part(self.closed, [*self._in(self.constant), *start], made, eqns)(
            *constant, *start.values())
        return {**start, **dict(zip(made, values, strict=True))}

    def restore(self, constant: Sequence[Any], slices: Sequence[Any], recorded: Sequence[Any],
                first: Sequence[Any]) -> WindowValues:
        """As :meth:`run_downstream`, where the downstream states were recorded too."""
        window_values = WindowValues(
            dict(zip((*self._slices, *self.recorded), (*slices, *recorded), strict=True)), {}, {})
        of_downstream = {self._entering[i]: self._leaving[i] for s in self.downstream for i in s}
        window_values.enter({**self.entered, **of_downstream},
                            self._first(constant, dict(zip(self._entering, first, strict=True))))
        return window_values

    def recompute(self, constant: Sequence[Any], window_values: WindowValues,
                  later: Sequence[int] = ()) -> Recomputed:
        """Everything else, for all steps together.

        ``later``: stacked outputs that are finished a step at a time, by cheap operations on
        expensive intermediate values that are computed here. A sum over steps of a product (the
        gradient of a plain weight) becomes one product that contracts the steps too: no array of
        steps x weights appears.
        """
        step_sums, stacks = self._step_sums(), window_values.stacks
        between, afterwards, needed = self._between(self._out(later), stacks)
        now = self._out(i for i in self.stacked if i not in later)
        wanted = list(dict.fromkeys([*now, *step_sums.needed, *between]))
        same = self._same(
            constant, [*step_sums.fixed, *(v for v in wanted if not step_sums.vary(v))])
        self._make(constant, stacks, [v for v in wanted if v not in same])

        given = [v for v in stacks if v in needed]
        earlier = [v for v in given if v in window_values.earlier]
        given = [v for v in given if v not in window_values.earlier]
        run_later = part(self.closed, [*self._in(self.constant), *same, *given, *earlier],
                         self._out(later), afterwards)
        return Recomputed([stacks[v] for v in now],
                          [step_sums.of(v, stacks, same) for v in self._out(self.summed)],
                          [stacks[v] for v in given], [window_values.earlier[v] for v in earlier],
                          lambda slices: run_later(*constant, *same.values(), *slices))

    def _step_sums(self) -> StepSums:
        return StepSums(self.recomputed, [*self._in(self.varying), *self.residuals, *self.entered],
                        self._out(self.summed))

    def _make(self, constant: Sequence[Any], stacks: dict[Any, Any],
              wanted: Sequence[Any]) -> None:
        """Add stacks of the ``wanted`` variables, for all steps together."""
        eqns, _ = backward_slice(self.closed.jaxpr, wanted, given=set(stacks))
        run = part(self.closed, [*self._in(self.constant), *stacks], wanted, eqns)
        made = jax.vmap(lambda *step: run(*constant, *step))(*stacks.values())
        stacks.update(zip(wanted, made, strict=True))

    def _run_group(self, group: Sequence[int], constant: Sequence[Any],
                   window_values: WindowValues,
                   first: dict[Any, Any], step_sums: StepSums) -> dict[int, Any]:
        """Add stacks of a group's states before and after each step; return their last values."""
        stacks = window_values.stacks
        enter, leave = ([a[i] for i in group] for a in (self._entering, self._leaving))
        between, eqns, needed = self._between(leave, [*stacks, *enter])
        same = self._same(constant, [v for v in between if not step_sums.vary(v)])
        self._make(constant, stacks, [v for v in between if v not in same])
        given = [v for v in stacks if v in needed]
        run = part(self.closed, [*self._in(self.constant), *same, *enter, *given], leave, eqns)

        def step(states: Any, slices: Any) -> Any:
            new = run(*constant, *same.values(), *states, *slices)
            new = [jnp.asarray(a, v.aval.dtype) for a, v in zip(new, enter, strict=True)]
            return new, new

        start = [jnp.asarray(first[v], v.aval.dtype) for v in enter]
        slices = [stacks[v] for v in given]
        size = sum(v.aval.size for v in enter)
        turn = unroll_of(len(eqns), size, slices[0].shape[0], self.unroll)
        last, after = lax.scan(step, start, slices, unroll=turn)
        stacks.update(zip(leave, after, strict=True))
        window_values.enter(dict(zip(enter, leave, strict=True)), first)
        return dict(zip(group, last, strict=True))

    def _same(self, constant: Sequence[Any], wanted: Sequence[Any]) -> dict[Any, Any]:
        """Loop-invariant variables and their values."""
        wanted = list(dict.fromkeys(wanted))
        eqns, _ = backward_slice(self.closed.jaxpr, wanted)
        values = part(self.closed, self._in(self.constant), wanted, eqns)(*constant)
        return dict(zip(wanted, values, strict=True))

    def _between(self, later: Sequence[Any],
                 given: Iterable[Any]) -> tuple[list[Any], list[Any], set[Any]]:
        """Where the computation of the ``later`` outputs is cut.

        Returns the values to compute for all steps together (results of expensive equations, and
        their operands, which have to be arrays anyway), the equations that remain for later, and
        the variables that these read.
        """
        expensive = {v for e in self.recomputed if is_expensive(e) for v in e.outvars}
        stop = expensive | set(given)
        made, _ = backward_slice(self.closed.jaxpr, later, given=set(given))
        stop |= {v for e in made if is_expensive(e) for v in e.invars if not isinstance(v, Literal)}
        eqns, needed = backward_slice(self.closed.jaxpr, later, given=stop)
        produced = (v for e in self.recomputed for v in e.outvars)
        return [v for v in produced if v in stop and v in needed and v not in given], eqns, needed


def partition_step(closed: ClosedJaxpr, varying: Iterable[int], carried: Sequence[int],
                   stacked: Sequence[int], summed: Sequence[int],
                   in_loop: Sequence[int] = (), counter: int | None = None,
                   blocks: bool = False, unroll: int = 1) -> StepPartition:
    """Cut a step in two.

    Parameters
    ----------
    closed : ClosedJaxpr
        The step without nested calls (see :func:`traceops.compiler.jaxpr.inlined`).
    varying : iterable of int
        Inputs that differ from step to step; the others are loop-invariant.
    carried, stacked, summed, in_loop : sequence of int
        Outputs, as in :class:`StepPartition`; the loop-invariant ones among them are detected.
    counter : int, optional
        The carried output that goes up by one a step.
    blocks : bool
        Whether products with large weights are taken in column blocks.
    unroll : int
        Steps in an iteration of a loop over time.
    """
    jaxpr, varying = closed.jaxpr, tuple(sorted(varying))
    changing = [*(jaxpr.invars[i] for i in varying),
                *(v for e in jaxpr.eqns if not is_pure(e) for v in e.outvars)]
    varies = reached(jaxpr.eqns, changing)
    fixed = tuple(i for i in (*in_loop, *stacked)
                  if isinstance(jaxpr.outvars[i], Literal) or jaxpr.outvars[i] not in varies)
    in_loop, stacked = (tuple(i for i in a if i not in fixed) for a in (in_loop, stacked))
    enter = [jaxpr.invars[i] for i in varying[len(varying) - len(carried):]]
    leave, now, later = (
        [jaxpr.outvars[i] for i in a] for a in (carried, in_loop, (*stacked, *summed)))
    now += [v for e in backward_slice(jaxpr, [*leave, *later])[0]
            if _is_random(e) or not is_pure(e) for v in e.outvars]
    downstream = downstream_groups(jaxpr, leave, enter, now, is_expensive, changing)
    apart = {i for group in downstream for i in group}
    _, read = backward_slice(
        jaxpr, [v for p, v in enumerate(jaxpr.outvars) if p != counter], effects=True)
    counting = tuple(i for i, p in enumerate(carried) if p == counter and enter[i] not in read)
    core = [(o, v) for i, (o, v) in enumerate(zip(leave, enter, strict=True))
            if i not in apart and i not in counting]
    outvars = [*later, *(leave[i] for i in apart)]
    simulation, _ = backward_slice(jaxpr, [*(o for o, _ in core), *now], effects=True)
    expensive = {v for e in simulation if is_expensive(e) for v in e.outvars if v in varies}
    passes = {o: v for o, v in core if not isinstance(o, Literal)
              and o in varies and o not in enter}
    slices = {jaxpr.invars[i] for i in varying[:len(varying) - len(carried)]}
    constant = {*jaxpr.constvars, *jaxpr.invars} - {jaxpr.invars[i] for i in varying}
    residuals, entered = _residuals(
        jaxpr, simulation, outvars, core, passes, expensive, constant, slices)
    recomputed, _ = backward_slice(jaxpr, outvars, given={*residuals, *entered})
    block_products = tuple(e for e in simulation
                           if blocks and takes_column_blocks(e, e.invars, varies.__contains__))
    return StepPartition(
        closed, varying, tuple(carried), in_loop, stacked, fixed, tuple(summed), tuple(residuals),
        entered, tuple(downstream), counting, block_products, tuple(simulation),
        tuple(recomputed), unroll)


def _residuals(jaxpr: Any, simulation: Sequence[Any], outvars: Sequence[Any],
               core: Sequence[Any],
               passes: dict[Any, Any], expensive: Set[Any], constant: Set[Any],
               slices: Set[Any]) -> tuple[list[Any], dict[Any, Any]]:
    """The residuals, and the carried inputs that equal residuals of the step before."""
    recomputed, needed = backward_slice(jaxpr, outvars, given=expensive | set(passes))
    sources = [*(v for _, v in core if v in needed),
               *(v for e in simulation for v in e.outvars
                 if v in needed and (v in expensive or v in passes))]
    values = minimum_cut(recomputed, sources, passes, constant | slices, constant,
                         {v for v in outvars if not isinstance(v, Literal)}, is_expensive)
    _, needed = backward_slice(jaxpr, outvars, given={
        v for value in values for v in (value.now, value.before)})
    residuals, entered = [], {}
    for value in values:
        if value.now is not None and value.before in needed:
            entered[value.before] = value.now
        residuals.append(value.variable)
    return residuals, entered


def _number(made_by: dict[Any, Any], var: Any) -> Any:
    """The scalar that a variable broadcasts, or the variable."""
    eqn = None if isinstance(var, Literal) else made_by.get(var)
    if eqn is None or eqn.primitive.name != 'broadcast_in_dim' or eqn.invars[0].aval.shape:
        return var
    return eqn.invars[0]


def is_expensive(eqn: Any) -> bool:
    """Whether its results are kept rather than computed twice."""
    name, reads, makes = eqn.primitive.name, eqn.invars, eqn.outvars
    return name not in _CHEAP and not (
        name in _REDUCTIONS and reads[0].aval.size == makes[0].aval.size)


def _is_random(eqn: Any) -> bool:
    """Random numbers stay in the loop: some generators differ when batched over keys."""
    return eqn.primitive.name.startswith(('random_', 'rng_'))
