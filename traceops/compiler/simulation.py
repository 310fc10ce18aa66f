# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""One step of the loop over time: what the next step depends on, and the residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax
from jax.extend.core import Literal

from traceops.compiler.column_blocks import column_blocks_of, product
from traceops.compiler.jaxpr import backward_slice, part
from traceops.compiler.partition import StepPartition

__all__ = ['Simulate', 'advance', 'blocks_of', 'simulate', 'simulated']

#: ``(step, constants, slices, states, unroll, downstream=False) -> (states, kept)``, lists of
#: arrays; ``downstream``: the loop of states that no other state waits for.
Simulate = Callable[..., tuple[list[Any], list[Any]]]


def blocks_of(partition: StepPartition, constant: Sequence[Any]) -> dict[Any, list[Any]]:
    """The column blocks of the weights of each product that is taken in blocks."""
    weights = partition.same(constant, [eqn.invars[1] for eqn in partition.block_products])
    of = {v: column_blocks_of(value) for v, value in weights.items()}
    return {eqn.outvars[0]: of[eqn.invars[1]] for eqn in partition.block_products}


def advance(partition: StepPartition, constant: Sequence[Any], slices: Sequence[Any],
            carried: Sequence[Any], blocks: dict[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
    """All carried outputs of one step, and its :attr:`StepPartition.impure` values."""
    inputs = partition.inputs((*partition.constant, *partition.varying))
    out = _loop(partition, dict(zip(inputs, (*constant, *slices, *carried), strict=True)),
                [*partition.leaving, *partition.impure], (), blocks)
    return out[:len(partition.carried)], out[len(partition.carried):]


def simulate(partition: StepPartition, constant: Sequence[Any], slices: Sequence[Any],
             core: Sequence[Any], blocks: dict[Any, list[Any]], impure: Sequence[Any] | None = None,
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
                partition.residuals, blocks, again=impure is not None)
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
          residuals: Sequence[Any], blocks: dict[Any, list[Any]], again: bool = False) -> list[Any]:
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
        if not blocks.keys().isdisjoint(eqn.outvars):
            out = [product(eqn, env[eqn.invars[0]], blocks[eqn.outvars[0]])]
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
