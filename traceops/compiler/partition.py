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

import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, DropVar, Literal

from traceops.compiler.downstream import downstream_groups
from traceops.compiler.jaxpr import backward_slice, is_pure, part, producers, reached
from traceops.compiler.products import constants_of, takes_another_form
from traceops.compiler.residuals import minimum_cut

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
    products : tuple of equations
        Products that the loop over time takes in another form
        (see :mod:`traceops.compiler.products`).
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
    products: tuple[Any, ...]
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
        separate = {i for group in (*self.downstream, self.counting) for i in group}
        return tuple(i for i in range(len(self.carried)) if i not in separate)

    @property
    def constants(self) -> list[Any]:
        return self.inputs(self.constant)

    @property
    def slices(self) -> list[Any]:
        return self.inputs(self.varying[:len(self.varying) - len(self.carried)])

    @property
    def entering(self) -> list[Any]:
        return self.inputs(self.varying[len(self.varying) - len(self.carried):])

    @property
    def leaving(self) -> list[Any]:
        return self.outputs(self.carried)

    def inputs(self, positions: Iterable[int]) -> list[Any]:
        return [self.closed.jaxpr.invars[i] for i in positions]

    def outputs(self, positions: Iterable[int]) -> list[Any]:
        return [self.closed.jaxpr.outvars[i] for i in positions]

    @property
    def copied(self) -> list[Any]:
        """The weights of :attr:`products`, of which the loop over time reads a copy."""
        return list(dict.fromkeys(
            v for e in self.products for v in constants_of(e, e.invars)
            if jnp.issubdtype(v.aval.dtype, jnp.inexact)))

    @property
    def impure(self) -> list[Any]:
        """Results of equations that may run once a step, however often it is simulated: effects,
        callbacks, and generators with a state of their own.
        """
        return [v for e in self.simulation if not is_pure(e)
                for v in e.outvars if not isinstance(v, DropVar)]

    @property
    def recorded(self) -> tuple[Any, ...]:
        """What recomputation needs of every step: the residuals and the downstream states."""
        return (*self.residuals, *(self.leaving[i] for group in self.downstream for i in group))

    def same(self, constant: Sequence[Any], wanted: Sequence[Any]) -> dict[Any, Any]:
        """Loop-invariant variables and their values."""
        wanted = list(dict.fromkeys(wanted))
        eqns, _ = backward_slice(self.closed.jaxpr, wanted)
        values = part(self.closed, self.constants, wanted, eqns)(*constant)
        return dict(zip(wanted, values, strict=True))

    def invariants(self, constant: Sequence[Any]) -> list[Any]:
        """The loop-invariant outputs; one that repeats a scalar is returned as that scalar."""
        made_by = producers(self.closed.jaxpr)
        wanted = [_number(made_by, v) for v in self.outputs(self.fixed)]
        eqns, _ = backward_slice(self.closed.jaxpr, wanted)
        return part(self.closed, self.constants, wanted, eqns)(*constant)

    def whole(self, once: dict[int, Any]) -> dict[int, Any]:
        """The loop-invariant outputs, broadcast to full shape where they are read."""
        return {i: jnp.broadcast_to(a, self.closed.jaxpr.outvars[i].aval.shape)
                for i, a in once.items()}


def partition_step(closed: ClosedJaxpr, varying: Iterable[int], carried: Sequence[int],
                   stacked: Sequence[int], summed: Sequence[int],
                   in_loop: Sequence[int] = (), counter: int | None = None,
                   cpu: bool = False, unroll: int = 1) -> StepPartition:
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
    cpu : bool
        Whether products are taken in the form that a CPU is quickest with.
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
    separate = {i for group in downstream for i in group}
    _, read = backward_slice(
        jaxpr, [v for p, v in enumerate(jaxpr.outvars) if p != counter], effects=True)
    counting = tuple(i for i, p in enumerate(carried) if p == counter and enter[i] not in read)
    core = [(o, v) for i, (o, v) in enumerate(zip(leave, enter, strict=True))
            if i not in separate and i not in counting]
    outvars = [*later, *(leave[i] for i in separate)]
    simulation, _ = backward_slice(jaxpr, [*(o for o, _ in core), *now], effects=True)
    expensive = {v for e in simulation if is_expensive(e) for v in e.outvars if v in varies}
    passes = {o: v for o, v in core if not isinstance(o, Literal)
              and o in varies and o not in enter}
    slices = {jaxpr.invars[i] for i in varying[:len(varying) - len(carried)]}
    constant = {*jaxpr.constvars, *jaxpr.invars} - {jaxpr.invars[i] for i in varying}
    residuals, entered = _residuals(
        jaxpr, simulation, outvars, core, passes, expensive, constant, slices)
    recomputed, _ = backward_slice(jaxpr, outvars, given={*residuals, *entered})
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    products = tuple(e for e in simulation if cpu and takes_another_form(
        e, e.invars, lambda v: not isinstance(v, Literal) and v in varies,
        lambda v: isinstance(v, Literal) or v in known and not isinstance(known[v], Tracer)))
    return StepPartition(
        closed, varying, tuple(carried), in_loop, stacked, fixed, tuple(summed), tuple(residuals),
        entered, tuple(downstream), counting, products, tuple(simulation),
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
