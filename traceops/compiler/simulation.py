# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""One step of the loop over time: what the next step depends on, and the residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax
from jax.extend.core import Literal

from traceops.compiler.jaxpr import backward_slice, part
from traceops.compiler.partition import StepPartition
from traceops.compiler.products import Products, prepared

__all__ = ['Simulate', 'advance', 'products_of', 'simulate', 'simulated']

#: ``(step, constants, slices, states, unroll, downstream=False) -> (states, kept)``, lists of
#: arrays; ``downstream``: the loop of states that no other state waits for.
Simulate = Callable[..., tuple[list[Any], list[Any]]]


def products_of(partition: StepPartition, constant: Sequence[Any]) -> Products:
    """The products that the loop takes in another form, with these values of the constants."""
    def value(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else partition.same(constant, [v])[v]

    return prepared(((e.outvars[0], e, e.invars) for e in partition.products), value)


def advance(partition: StepPartition, constant: Sequence[Any], slices: Sequence[Any],
            carried: Sequence[Any], products: Products) -> tuple[list[Any], list[Any]]:
    """All carried outputs of one step, and its :attr:`StepPartition.impure` values."""
    inputs = partition.inputs((*partition.constant, *partition.varying))
    out = _loop(partition, dict(zip(inputs, (*constant, *slices, *carried), strict=True)),
                [*partition.leaving, *partition.impure], (), products)
    return out[:len(partition.carried)], out[len(partition.carried):]


def simulate(partition: StepPartition, constant: Sequence[Any], slices: Sequence[Any],
             core: Sequence[Any], products: Products, impure: Sequence[Any] | None = None,
             ) -> tuple[list[Any], list[Any], list[Any]]:
    """The core and the in-loop outputs of one step, and its residuals.

    With its :attr:`StepPartition.impure` values given, no effect runs.
    """
    core_in, core_out = ([a[i] for i in partition.core]
                         for a in (partition.entering, partition.leaving))
    in_loop = partition.outputs(partition.in_loop)
    inputs = [*partition.constants, *partition.slices, *core_in]
    env = dict(zip(inputs, (*constant, *slices, *core), strict=True))
    if impure is not None:
        env.update(zip(partition.impure, impure, strict=True))
    out = _loop(partition, env, [*core_out, *in_loop, *partition.residuals],
                partition.residuals, products, again=impure is not None)
    first, second = len(core_out), len(core_out) + len(in_loop)
    return out[:first], out[first:second], out[second:]


def simulated(partition: StepPartition, run: Simulate, constant: Sequence[Any],
              slices: Sequence[Any], core: Sequence[Any],
              impure: Sequence[Any] | None = None) -> tuple[list[Any], list[Any]]:
    """The core after a window, and the residuals of its steps, ``[T, ...]``.

    ``run`` runs the loop, inside which nothing is needed but what simulates; ``slices`` and
    ``impure``, what effects gave where they have run before, are of all steps.
    """
    count = len(slices)

    def step(constant: Any, now: Any, core: Any) -> Any:
        new, _, residuals = simulate(partition, constant, now[:count], core, {},
                                     None if impure is None else now[count:])
        return new, residuals

    return run(step, constant, [*slices, *(impure or ())], core, partition.unroll)


def _loop(partition: StepPartition, env: dict[Any, Any], wanted: Sequence[Any],
          residuals: Sequence[Any], products: Products, again: bool = False) -> list[Any]:
    """The values ``wanted`` of one step of the loop over time.

    A barrier after each residual and the states it is computed from makes XLA compute them
    once, before their readers. Without it XLA fuses a residual into each reader (the state
    update, the stored copy) and does the work twice, or updates in place a state that is
    read later, and has to copy it.
    """
    jaxpr = partition.closed.jaxpr
    states = [v for v in partition.leaving if not isinstance(v, Literal)]
    eqns, _ = backward_slice(
        jaxpr, wanted, set(partition.impure) if again else set(), effects=not again)
    for eqn in eqns:
        if not products.keys().isdisjoint(eqn.outvars):
            operand, product = products[eqn.outvars[0]]
            out = [product(env[operand])]
        else:
            read = [v for v in dict.fromkeys(
                v for v in eqn.invars if not isinstance(v, Literal)) if v in env]
            out = part(partition.closed, read, eqn.outvars, [eqn])(*(env[v] for v in read))
        env.update(zip(eqn.outvars, out, strict=True))
        if any(v in residuals for v in eqn.outvars):
            _, behind = backward_slice(jaxpr, eqn.outvars, given=set(states))
            once = [v for v in dict.fromkeys((*eqn.outvars, *states)) if v in behind and v in env]
            env.update(zip(once, lax.optimization_barrier([env[v] for v in once]), strict=True))
    return part(partition.closed, list(env), wanted, ())(*env.values())
