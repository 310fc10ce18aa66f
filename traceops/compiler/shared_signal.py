# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Shared learning signals: the signals on all states of a neuron, as multiples of one array.

The loss reaches the states of a spiking neuron through its spike: the signals on its potential and
on its threshold are one array (a product with the weights of the next layer) times factors that are
known inside the loop over time. Traces can then be multiplied with these factors and summed over
the states inside the loop, and one array is recorded instead of one for each state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from traceops.compiler.jaxpr import (
    alone,
    backward_slice,
    extended,
    is_zero,
    producers,
    reached,
)

__all__ = ['SharedSignal', 'shared_signals']

#: Results that have the elements of their only operand in the same order, if as many.
_SAME = frozenset(
    'broadcast_in_dim convert_element_type copy expand_dims neg reshape squeeze'.split())
_SUMS = frozenset('add add_any sub'.split())


@dataclasses.dataclass(frozen=True)
class SharedSignal:
    """Signals ``scale * of``, one for each of the ``scales``, which a forward fold sees.

    ``scales`` have the shape of the signals; ``of`` has as many elements, in the same order, or
    is ``None``: one.
    """

    scales: Any
    of: Any

    def paired(self, states: Sequence[Any]) -> Any:
        """Of one step: what times ``of`` is the sum of signal times state, over all states."""
        return sum(scale * state for scale, state in zip(self.scales, states, strict=True))

    def like(self, paired: Any) -> Any:
        """``of`` of all steps, to be multiplied with what was :meth:`paired`, ``[T, ...]``."""
        return jnp.ones((), paired.dtype) if self.of is None else self.of.astype(
            paired.dtype).reshape(-1, *paired.shape[1:])


jax.tree_util.register_dataclass(SharedSignal, ['scales', 'of'], [])


def shared_signals(closed: ClosedJaxpr, signals: Sequence[Sequence[int]], ahead: Iterable[int],
              is_expensive: Callable[[Any], bool]) -> tuple[ClosedJaxpr, list[Any]]:
    """The factors of signals as outputs of the step.

    Parameters
    ----------
    closed : ClosedJaxpr
        A step.
    signals : sequence of sequence of int
        Outputs, group by group.
    ahead : iterable of int
        Outputs that are computed inside the loop.
    is_expensive : callable
        Whether an equation is.

    Returns
    -------
    closed : ClosedJaxpr
        The step with more outputs.
    places : list
        Of each group: a :class:`SharedSignal` of positions of outputs, or the group as it was.
    """
    jaxpr = closed.jaxpr
    before, _ = backward_slice(jaxpr, [jaxpr.outvars[i] for i in ahead], effects=True)
    known = {v for e in before for v in e.outvars}
    ways = _Ways(jaxpr, reached(jaxpr.eqns, [
        v for e in jaxpr.eqns if is_expensive(e) for v in e.outvars if v not in known]))
    places: list[Any] = []
    for group in signals:
        wanted = [jaxpr.outvars[i] for i in group]
        of, reads = ways.common(wanted)
        if of is None:
            places.append(group)
            continue
        first = len(closed.jaxpr.outvars)
        places.append(SharedSignal([first + 1 + i for i in range(len(group))], first))
        closed = extended(closed, [of], reads, functools.partial(ways.scales, wanted, of, reads))
    return closed, places


class _Ways:
    """How signals depend on values that are only computed in the recomputation (``late``)."""

    def __init__(self, jaxpr: Jaxpr, late: set[Any]) -> None:
        self.jaxpr, self.late, self.producers = jaxpr, late, producers(jaxpr)

    def common(self, wanted: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The one variable of which all signals are multiples, and what else they read."""
        found, reads, todo, way = set(), [], list(wanted), set()
        while todo:
            v = self._whole(todo.pop())
            if self._is_late(v) and self._is_multiple(self.producers[v]):
                way.add(v)
                todo += [w for w in self.producers[v].invars if self._is_late(w)]
                reads += [w for w in self.producers[v].invars if not (
                    isinstance(w, Literal) or self._is_late(w))]
            elif self._is_late(v):
                found.add(v)
            elif not is_zero(self.producers, v):
                return None, []
        return (found.pop(), list(dict.fromkeys(reads))) if way and len(found) == 1 else (None, [])

    def scales(self, wanted: Sequence[Any], of: Any, reads: Sequence[Any],
               *values: Any) -> list[Any]:
        """Of each variable, what multiplies ``of``."""
        env = {**dict(zip(reads, values, strict=True)),
               of: jnp.ones(of.aval.shape, of.aval.dtype)}

        def value(v: Any) -> Any:
            if isinstance(v, Literal):
                return v.val
            if v not in env:
                whole = self._whole(v)
                env[v] = self._made(v, value) if whole is v else jnp.reshape(
                    value(whole), v.aval.shape)
            return env[v]

        return [value(v) for v in wanted]

    def _made(self, var: Any, value: Callable[[Any], Any]) -> Any:
        if not self._is_late(var):
            return jnp.zeros(var.aval.shape, var.aval.dtype)
        return alone(self.jaxpr, self.producers[var], value)[0]

    def _is_late(self, var: Any) -> bool:
        return not isinstance(var, Literal) and var in self.late

    def _whole(self, var: Any) -> Any:
        """What was joined with others and is cut out again."""
        cut = None if isinstance(var, Literal) else self.producers.get(var)
        if cut is None or cut.primitive.name != 'slice' or cut.params['strides'] is not None:
            return var
        joined = self.producers.get(cut.invars[0])
        if joined is None or joined.primitive.name not in ('concatenate', 'stack'):
            return var
        stacked = joined.primitive.name == 'stack'
        start, axis = 0, joined.params['axis' if stacked else 'dimension']
        for v in joined.invars:
            if start == cut.params['start_indices'][axis] and v.aval.size == var.aval.size:
                return v
            start += 1 if stacked else v.aval.shape[axis]
        return var

    def _is_multiple(self, eqn: Any) -> bool:
        """Whether each element of a result is a multiple of that of its late operand."""
        name, operands, (out, *_) = eqn.primitive.name, eqn.invars, eqn.outvars
        late = [v for v in operands if self._is_late(v)]
        if any(_shape(v) != _shape(out) for v in late):
            return False
        if name in _SAME:
            return bool(jnp.issubdtype(out.aval.dtype, jnp.inexact))
        if name in ('mul', 'div'):
            return len(late) == 1 and (name == 'mul' or late[0] is operands[0])
        if name == 'select_n' and not self._is_late(operands[0]):
            operands = operands[1:]
        elif name not in _SUMS:
            return False
        return all(self._is_late(v) or is_zero(self.producers, v) for v in operands)


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(n for n in var.aval.shape if n != 1)
