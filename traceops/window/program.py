# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A step function as a pure program: states in, states out, and what it records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from traceops.window.jaxprs import is_zero, value_if_constant

__all__ = ['StepProgram', 'trace_step']


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """One step, traced once.

    The step returns a dict: ``'sum'`` adds up over the steps, everything else is stacked.
    States that it writes are carried from step to step, except the *tape*, whose values are
    stacked under ``'tape'``.

    Attributes
    ----------
    count : int or None
        How often the step advances the counter state: 1 is what the engine needs; ``None``
        when that cannot be known.
    record_bytes : int
        Bytes that one step adds to the record.
    """

    function: Any
    states: tuple[Any, ...]
    written: tuple[bool, ...]
    tape: tuple[Any, ...]
    summed: tuple[int, ...]
    sum_tree: Any
    sum_avals: tuple[Any, ...]
    count: int | None
    record_bytes: int

    def _is_carried(self, i: int) -> bool:
        return self.written[i] and not any(self.states[i] is t for t in self.tape)

    @property
    def carried(self) -> tuple[int, ...]:
        """Positions of the states that pass from step to step."""
        return tuple(i for i in range(len(self.states)) if self._is_carried(i))

    def initial(self) -> tuple[Any, Any]:
        """Current values of the carried states, and zeros for the sums."""
        states = tuple(jax.tree.map(jnp.asarray, self.states[i].value) for i in self.carried)
        return states, tuple(jnp.zeros(a.shape, a.dtype) for a in self.sum_avals)

    def by_id(self, states: Any) -> dict[int, Any]:
        """Carried values by the identity of their state."""
        return {id(self.states[i]): v for i, v in zip(self.carried, states, strict=True)}

    def store(self, states: Any) -> None:
        """Write carried values back into their states."""
        for i, value in zip(self.carried, states, strict=True):
            self.states[i].value = value

    def scan(self, states: Any, sums: Any, xs: Any, inner: Any = (),
             digest: Callable[..., Any] | None = None) -> tuple[Any, Any, Any, Any]:
        """Run the step over ``xs``: new states, new sums, what ``digest`` carried, outputs.

        ``digest(inner, outputs, states before the step) -> (inner, outputs)`` sees each step's
        outputs before they are stacked: what it folds away is never stored.
        """
        constants = [s.value for s in self.states]

        def body(carry: Any, x: Any) -> Any:
            states, sums, inner = carry
            before = self.by_id(states)
            values = list(constants)
            for i, v in zip(self.carried, states, strict=True):
                values[i] = v
            new, out = self.function.jaxpr_call(values, *x)
            leaves = jax.tree.leaves(out.pop('sum'))
            sums = tuple(a + leaves[i] for a, i in zip(sums, self.summed, strict=True))
            by_id = {id(s): v for s, v in zip(self.states, new, strict=True)}
            out['tape'] = tuple(by_id[id(t)] for t in self.tape)
            states = tuple(_like(new[i], values[i]) for i in self.carried)
            if digest is not None:
                inner, out = digest(inner, out, before)
            return (states, sums, inner), out

        (states, sums, inner), out = jax.lax.scan(body, (states, sums, inner), xs)
        return states, sums, inner, out

    def unflatten_sums(self, sums: Any, like: Any) -> Any:
        """The sums in the structure of ``like``; ``None`` where the step never adds anything."""
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
    """A carried value with the dtype it came in with (a weak type would not close the loop)."""
    return jax.tree.map(lambda a, b: jnp.asarray(a, jnp.asarray(b).dtype), new, old)


def trace_step(step: Callable[..., Any], xs: tuple[Any, ...], *, tape: Sequence[Any],
               constants: Sequence[Any], counter: Any) -> StepProgram:
    """Trace ``step`` on one slice of ``xs``; no state changes.

    Parameters
    ----------
    step : callable
        Called with one slice of each entry of ``xs``; returns a dict with ``'sum'``.
    xs : tuple of pytrees, ``[T, ...]``
    tape : sequence of State
        Written by the step, stacked instead of carried.
    constants : sequence of State
        Read, never carried.
    counter : State
        Advanced by one at every call that is to be counted.
    """
    function = brainstate.transform.StatefulFunction(step, name='traceops_step')
    slices = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], jnp.result_type(a)), xs)
    function.make_jaxpr(*slices)
    key = function.get_arg_cache_key(*slices)
    trace = function.get_state_trace_by_cache(key)
    states, written = tuple(trace.states), tuple(trace.been_writen)
    written = tuple(w and not any(s is c for c in constants)
                    for s, w in zip(states, written, strict=True))
    closed = function.get_jaxpr_by_cache(key)
    out, new_states = function.get_out_shapes_by_cache(key)
    positions, new_positions = function.get_out_treedef_by_cache(key).unflatten(
        range(len(closed.jaxpr.outvars)))
    sums = jax.tree.leaves(positions['sum'])
    summed = tuple(i for i, p in enumerate(sums) if not is_zero(closed, p))
    avals = jax.tree.leaves(out['sum'])
    recorded = [out['record']] + [v for s, v in zip(states, new_states, strict=True)
                                  if any(s is t for t in tape)]
    return StepProgram(
        function=function, states=states, written=written, tape=tuple(tape), summed=summed,
        sum_tree=jax.tree.structure(out['sum']), sum_avals=tuple(avals[i] for i in summed),
        count=_count(closed, len(jax.tree.leaves(slices)), states, written, new_positions,
                     counter),
        record_bytes=sum(int(np.prod(a.shape)) * a.dtype.itemsize
                         for a in jax.tree.leaves(recorded)))


def _count(closed: Any, n_args: int, states: Any, written: Any, positions: Any,
           counter: Any) -> int | None:
    """How much one step adds to the counter, where the program alone determines it."""
    place = n_args
    for state, write, position in zip(states, written, positions, strict=True):
        leaves = jax.tree.leaves(state.value)
        if state is counter:
            if not write:
                return 0
            aval = closed.jaxpr.invars[place].aval
            value = value_if_constant(closed, jax.tree.leaves(position)[0],
                                      {place: np.zeros(aval.shape, aval.dtype)})
            if value is None or np.unique(np.asarray(value)).size != 1:
                return None
            return int(np.ravel(np.asarray(value))[0])
        place += len(leaves)
    return 0
