# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What became of the calls and loops of a function, or of the process."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import brainstate
import jax
import numpy as np
from rich.table import Table

from traceops.host import loops, patch, seen
from traceops.reasons import instead_of, with_advice
from traceops.text import render

__all__ = ['LoopsExplanation', 'of_events', 'of_function', 'of_process']

#: What a function raises that needs the values of arrays, when it is traced.
_NEEDS_VALUES = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
                 jax.errors.TracerIntegerConversionError)


@dataclasses.dataclass(frozen=True)
class LoopsExplanation:
    """Loops and calls of :func:`explain`; ``str()`` is a table, :meth:`to_dict` for machines."""

    loops: tuple[loops.Loop, ...]
    calls: tuple[seen.Call, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        return {'loops': [{**dataclasses.asdict(loop), 'instead': dict(_declined(loop))}
                          for loop in self.loops],
                'calls': [{**dataclasses.asdict(call), 'instead': call.instead}
                          for call in self.calls],
                'notes': list(self.notes)}

    def __str__(self) -> str:
        if not self.loops and not self.calls:
            return ('No fast learner was seen at work. A learner is fast when it is made '
                    'after traceops.install(), or inside a function that is decorated with '
                    '@traceops.accelerate, and on the engine of D_RTRL or ES_D_RTRL '
                    '(traceops.explain(learner) says so). Calls and loops are seen when they are '
                    'traced: a function that was jitted and called before is not traced again.')
        return '\n'.join([*([self._calls()] if self.calls else []),
                          *([self._loops()] if self.loops else []),
                          *(f'- {note}' for note in self.notes)])

    def _calls(self) -> str:
        table = Table(title='traceops: calls', title_justify='left')
        for name in ('call', 'what', 'learner', 'steps', 'engine', 'because'):
            table.add_column(name, overflow='fold')
        for call in self.calls:
            table.add_row(call.where, call.what, call.learner, str(call.steps), call.engine,
                          call.reason)
        return '\n'.join([render(table).rstrip(), *with_advice(
            (call.reason, call.instead) for call in self.calls if call.instead)])

    def _loops(self) -> str:
        table = Table(title='traceops: loops over time', title_justify='left')
        for name in ('loop', 'steps', 'learner', 'gradients are formed', 'because'):
            table.add_column(name, overflow='fold')
        for loop in self.loops:
            for learner in loop.deferred:
                table.add_row(loop.where, str(loop.steps), learner, loop.how_often,
                              'the loop only adds them up')
            for learner, reason in loop.forward:
                table.add_row(loop.where, str(loop.steps), learner, 'none is taken', reason or
                              f'its trace is formed {loop.how_often}')
            for learner, reason in loop.kept:
                table.add_row(loop.where, str(loop.steps), learner, 'at every step', reason)
        lines = [render(table).rstrip()]
        if any(loop.deferred for loop in self.loops):
            lines.append('- formed after the steps: no trace is rolled inside the loop; it keeps '
                         'the factors of each step instead. What the loop returns is the same.')
        if any(loop.kept for loop in self.loops):
            lines.append('- at every step: the loop runs as it is written.')
        if any(not reason for loop in self.loops for _, reason in loop.forward):
            lines.append('- none is taken: where no gradient reads the trace afterwards (an '
                         'evaluation), call the model in the place of the learner: its outputs are '
                         'the same, and no trace is formed.')
        lines += with_advice(one for loop in self.loops for one in _declined(loop))
        lines += [f'- {loop.where}: {said}' for loop in self.loops
                  for said in (*loop.products, *loop.simulation,
                               *of_events(loop.events))]
        return '\n'.join(lines)


def of_events(names: Sequence[str]) -> list[str]:
    """What is said of parameters whose gradient may be the sum over spikes."""
    return [f'spikes enter {", ".join(names)}: of a long window in which few are not zero, the '
            'gradient is the sum over those'] if names else []


def _declined(loop: loops.Loop) -> list[tuple[str, str]]:
    """Why learners of a loop run as they are written, and what to write instead."""
    return [(reason, instead_of(reason)) for _, reason in (*loop.kept, *loop.forward) if reason]


def of_process() -> LoopsExplanation:
    """All calls and loops that were seen."""
    return LoopsExplanation(loops.known(), seen.known())


def of_function(fn: Callable[..., Any], args: Any, kwargs: Any) -> LoopsExplanation:
    """The calls and loops of a function, which is traced."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))]

    def traced(*values: Any) -> None:       # what is no array may be static, or unknown to jax
        given = dict(zip(arrays, values, strict=True))
        args, kwargs = tree.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)])
        _not_jitted(fn)(*args, **kwargs)

    found: list[loops.Loop] = []
    calls: list[seen.Call] = []
    tokens = loops.watching.set(found), seen.watching.set(calls)
    try:
        with patch.enabled():
            brainstate.transform.make_jaxpr(traced)(*(leaves[i] for i in arrays))
    except _NEEDS_VALUES as err:
        return _all_that_was_seen(f'{_name(fn)} cannot be traced, for it needs the values of '
                                  f'arrays while it runs ({seen.raised_at(err)})')
    finally:
        loops.watching.reset(tokens[0])
        seen.watching.reset(tokens[1])
    if not found and not calls and (loops.known() or seen.known()):
        return _all_that_was_seen(f'in {_name(fn)} no learner was seen at work: there is none, or '
                                  'the jitted functions that it calls were traced before')
    return LoopsExplanation(tuple(dict.fromkeys(found)), tuple(dict.fromkeys(calls)))


def _not_jitted(fn: Any) -> Any:
    """The function inside of ``jit``: one that was traced before is not traced again."""
    if isinstance(fn, functools.partial):
        return functools.partial(_not_jitted(fn.func), *fn.args, **fn.keywords)
    if isinstance(fn, types.MethodType):
        return types.MethodType(_not_jitted(fn.__func__), fn.__self__)
    if hasattr(fn, 'traceops_settings'):
        return patch.accelerate(_not_jitted(fn.__wrapped__), **fn.traceops_settings)
    inside = getattr(fn, 'origin_fun', None)            # brainstate's jit; and jax's
    if inside is None and hasattr(fn, 'lower'):
        inside = getattr(fn, '__wrapped__', None)
    return fn if inside is None else _not_jitted(inside)


def _all_that_was_seen(why: str) -> LoopsExplanation:
    return LoopsExplanation(loops.known(), seen.known(), (
        f'{why}. The list is what this process has seen so far, as traceops.explain() gives it; of '
        'a jitted function alone, traceops.explain(function, *its_arguments)',))


def _name(fn: Any) -> str:
    return str(getattr(fn, '__qualname__', type(fn).__name__))
