# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A step as brainstate traces it, in the types that it has in a loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import brainstate
import jax
import jax.numpy as jnp

from traceops import reasons
from traceops.compiler.types import CarryTypeError

__all__ = ['Traced', 'places_of', 'trace']


@dataclasses.dataclass(frozen=True)
class Traced:
    """A step as brainstate traces it; ``before`` and ``after`` are the types of its states."""

    closed: Any
    states: tuple[Any, ...]
    written: tuple[bool, ...]
    positions: Any
    new_positions: Any
    before: tuple[Any, ...]
    after: tuple[Any, ...]


def trace(step: Callable[..., Any], slices: Any, kept: Sequence[Any]) -> Traced:
    """The step in the types of a loop, as ``jax.lax.scan`` has them: a state of a weak type
    takes the type that it is left in.
    """
    traced = _trace_once(step, slices)
    changed = [i for i, (a, b) in enumerate(zip(traced.before, traced.after, strict=True))
               if traced.written[i] and not any(traced.states[i] is s for s in kept)
               and not _same(a, b)]
    if not changed:
        return traced
    for i in changed:
        if jax.tree.structure(traced.before[i]) != jax.tree.structure(traced.after[i]):
            raise _changes(traced.before[i], traced.after[i])
    values = [traced.states[i].value for i in changed]
    try:
        for i, value in zip(changed, values, strict=True):
            traced.states[i].value = jax.tree.map(_promoted, value, traced.before[i],
                                                  traced.after[i])
        again = _trace_once(step, slices)
    finally:
        for i, value in zip(changed, values, strict=True):
            traced.states[i].value = value
    for i in changed:
        if not _same(again.before[i], again.after[i]):
            raise _changes(again.before[i], again.after[i])
    return again


def _changes(before: Any, after: Any) -> CarryTypeError:
    return CarryTypeError(reasons.CARRY_TYPE(before=before, after=after))


def _promoted(value: Any, before: Any, after: Any) -> Any:
    if before.dtype == after.dtype:
        return value
    if not before.weak_type:
        raise _changes(before, after)
    return jnp.asarray(value, jnp.promote_types(before.dtype, after.dtype))


def _same(before: Any, after: Any) -> bool:
    return jax.tree.structure(before) == jax.tree.structure(after) and all(
        a.dtype == b.dtype and a.shape == b.shape
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def _trace_once(step: Callable[..., Any], slices: Any) -> Traced:
    function = brainstate.transform.StatefulFunction(step, name='traceops_step')
    function.make_jaxpr(*slices)
    key = function.get_arg_cache_key(*slices)
    seen = function.get_state_trace_by_cache(key)
    closed, states = function.get_jaxpr_by_cache(key), tuple(seen.states)
    positions, new_positions = function.get_out_treedef_by_cache(key).unflatten(
        range(len(closed.jaxpr.outvars)))
    first = len(jax.tree.leaves(slices))
    places = places_of(states, first)
    before = tuple(
        jax.tree.unflatten(jax.tree.structure(s.value), [closed.in_avals[p] for p in at])
        for s, at in zip(states, places, strict=True))
    after = tuple(jax.tree.map(lambda p: closed.out_avals[p], at) for at in new_positions)
    return Traced(closed, states, tuple(seen.been_writen), positions, new_positions, before,
                   after)


def places_of(states: Sequence[Any], first: int) -> list[range]:
    """Of each state, where its leaves are among the inputs of the step."""
    places = []
    for state in states:
        places.append(range(first, first + len(jax.tree.leaves(state.value))))
        first = places[-1].stop
    return places
