# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Loops that people write around a learner: gradients that are only added up wait until after.

``jax.lax.scan`` is underneath ``brainstate.transform.scan``, ``for_loop`` and every loop written
by hand. :func:`scan` stands in its place: it has the original trace the loop, looks for a learner's
steps in it (:mod:`traceops.engine.step`), asks :mod:`traceops.loops.analysis` whether their
gradients can wait, and runs the loop without traces, a window at a time
(:mod:`traceops.loops.deferred`). Every other loop runs as the original traced it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
from jax.extend.core import Literal

from traceops import reasons
from traceops.compiler.outside_jit import Programs
from traceops.compiler.products import describe
from traceops.host import upstream
from traceops.host.deferred import Deferred
from traceops.host.forms import (
    Simulator,
    at_once,
    by_form,
    form_of_loops,
    forms_of,
    is_outside_jit,
    simulator_of,
)
from traceops.host.plan import why_short
from traceops.host.relations import event_weights
from traceops.host.seen import belong_to_a_loop, caller, in_a_loop, name_of, note_loop
from traceops.host.steps import is_known_free, loops_are_watched, note_free, unwatched
from traceops.loops.analysis import Analysis, Learner
from traceops.loops.body import owners_in
from traceops.loops.deferred import DeferredLoop
from traceops.loops.flat import apply
from traceops.loops.trace import TracedCall, TracedLoop
from traceops.reasons import Reason

__all__ = ['Loop', 'known', 'scan', 'watching']


@dataclasses.dataclass(frozen=True)
class Loop:
    """What became of one loop around fast learners.

    Attributes
    ----------
    where : str
        File, line and function that wrote the loop.
    steps : int
    window : int or None
        Steps whose factors are kept before their gradients are formed; ``None``: no gradient
        waits.
    deferred : tuple of str
        Learners whose gradients wait.
    kept : tuple of (str, str)
        Learners that run as they are written, and why.
    products : tuple of str
        Products that the loop takes in another form.
    events : tuple of str
        Parameters whose gradient is summed over spikes, where few are not zero.
    forward : tuple of (str, str)
        Learners of which no gradient is taken, and why their trace is rolled at every step
        (empty: it is formed once a window).
    simulation : tuple of str
        How the loop that only simulates runs, where there is one.
    """

    where: str
    steps: int
    window: int | None
    deferred: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]
    products: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    forward: tuple[tuple[str, str], ...] = ()
    simulation: tuple[str, ...] = ()

    @property
    def how_often(self) -> str:
        """How often gradients that wait are formed, in words."""
        return 'once, after the loop' if self.window == self.steps \
            else f'once every {self.window} steps'


watching: ContextVar[list[Loop] | None] = ContextVar('traceops_watching', default=None)
_known: dict[Loop, None] = {}
_MOST = 256                     # loops that are remembered


def known() -> tuple[Loop, ...]:
    """The loops around fast learners that this process has traced, the oldest first."""
    return tuple(_known)


@in_a_loop()
def scan(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``jax.lax.scan``, without traces where nothing in the loop reads them.

    The original is given what it was given, whatever that is, and traces it; what it traced is
    then run, or the same without traces.
    """
    body = args[0] if args else kwargs.get('f')
    if (not loops_are_watched() or is_known_free(body)
            or jax.config.jax_disable_jit):  # type: ignore[attr-defined]
        return original(*args, **kwargs)
    call = TracedCall(lambda: original(*args, **kwargs))
    owners = {} if call.equation is None else owners_in(call.closed.jaxpr)
    if not owners:
        note_free(body)
        return call.run()
    for owner, taken in owners.values():
        belong_to_a_loop(owner, taken or 1)     # several steps at once are no step
    learners: Sequence[Learner] = [
        Learner(owner, reasons.LOOP_OF_ONE()) for owner, _ in owners.values()]
    loop, deferred = None, None
    try:
        loop = TracedLoop(call.equation, call.values)
        if loop.steps > 1:
            analysis = Analysis(loop.flat, loop.carries)
            learners = analysis.learners
            if analysis.deferred:
                found = _in_forms(original, loop, analysis, call)
                learners, deferred = found.learners, found if any(found.loops.values()) else None
    except Exception as err:  # what is chosen automatically never fails, and says why it was not
        learners = _refused(learners, err)

    def instead(*operands: Any) -> Sequence[Any]:
        """Traced before anything runs: an error of the loop itself is not one of the choice."""
        nonlocal deferred, learners
        assert deferred is not None
        try:
            with unwatched():
                closed = jax.make_jaxpr(functools.partial(_either, deferred))(*operands)
        except Exception as err:
            deferred, learners = None, _refused(learners, err)
            return apply(call.equation, operands)
        return deferred.programs.evaluate(closed, *operands)

    try:
        return call.run() if deferred is None else call.run(instead)
    finally:
        if learners and loop is not None:
            _report(learners, loop.steps, deferred)


def _why_rolled(one: Learner, together: bool) -> Reason | None:
    """Why a trace that no gradient reads is rolled at every step, if it is."""
    return reasons.NO_TRACE() if one.forward and not together and isinstance(
        one.owner, upstream.IODimVjpAlgorithm) else None


def _refused(learners: Sequence[Learner], err: Exception) -> list[Learner]:
    """None of the gradients waits, for an error that nobody foresaw."""
    why = reasons.UNFORESEEN(error=f'{type(err).__name__}: {err}')
    return [dataclasses.replace(one, reason=one.reason or why) for one in learners]


@dataclasses.dataclass(frozen=True)
class _Forms:
    """Of each form that the loop may have, here first: the loop without the traces of learners
    whose gradients wait; ``None``, the loop as it is written, where none is to.

    Attributes
    ----------
    learners : list of Learner
        What becomes of them here.
    equation : JaxprEqn
        The loop as it is written.
    """

    settings: Any
    programs: Programs
    loops: dict[bool, DeferredLoop | None]
    learners: list[Learner]
    equation: Any

    @property
    def here(self) -> DeferredLoop | None:
        return next(iter(self.loops.values()))


def _in_forms(original: Callable[..., Any], loop: TracedLoop, analysis: Analysis,
              call: TracedCall) -> _Forms:
    # one loop, one form: that for a GPU where any learner has it
    owners = [one.owner.traceops_settings for one in analysis.deferred]
    asked = next((settings for settings in owners if at_once(settings)), owners[0])
    here, *elsewhere = forms_of(asked)

    def learners_in(together: bool) -> list[Learner]:
        return [dataclasses.replace(one, reason=(
            one.reason or _why_rolled(one, together)
            or why_short(one.owner, one.lanes, together, loop.steps)))
            for one in analysis.learners]

    learners = {here: learners_in(here)}
    for together in elsewhere:      # outside jit, whether gradients wait is known
        learners[together] = learners_in(
            here if is_outside_jit(call.closed.consts) else together)

    def form(together: bool) -> DeferredLoop | None:
        waiting = [Deferred(one, together, _from_zero(one, loop, call))
                   for one in learners[together] if not one.reason]
        return DeferredLoop(original, loop, analysis, waiting,
                            simulate=simulator_of(asked, together),
                            **form_of_loops(together)) if waiting else None

    with unwatched():
        return _Forms(asked, analysis.deferred[0].owner._programs,
                      {together: form(together) for together in learners},
                      learners[here], call.equation)


def _from_zero(one: Learner, loop: TracedLoop, call: TracedCall) -> bool:
    """Whether the trace that enters is the very zeros that a reset put there."""
    given = dict(zip(call.closed.jaxpr.constvars, call.closed.consts, strict=True))
    _, init, _ = loop.split([None if isinstance(v, Literal) else given.get(v)
                             for v in call.equation.invars])
    return all(any(init[i] is zeros for zeros in one.owner._traceops.fresh)
               for i in (*one.trace, *one.filters))


def _either(forms: _Forms, *operands: Any) -> list[Any]:
    """The loop, in the form of the platform that the program is lowered for."""
    def run(together: bool) -> Any:
        loop = forms.loops[together]
        return list(loop(*operands) if loop else apply(forms.equation, operands))
    return run(next(iter(forms.loops))) if len(forms.loops) == 1 else by_form(forms.settings, run)


def _report(learners: Sequence[Learner], steps: int, forms: _Forms | None) -> None:
    deferred = forms.here if forms else None
    waiting = [one for one in learners if not one.reason and one.products]
    simulate = deferred.at_once.simulate if deferred and deferred.at_once else None
    loop = Loop(
        simulation=tuple(simulate.describe()) if isinstance(simulate, Simulator) else (),
        where=caller(), steps=steps, window=deferred.window if deferred else None,
        products=tuple(describe(deferred.products)) if deferred else (),
        deferred=tuple(name_of(one.owner) for one in waiting),
        kept=tuple((name_of(one.owner), one.reason) for one in learners
                   if one.reason and not one.forward),
        events=tuple(dict.fromkeys(
            name for one in waiting for name in event_weights(one.owner))),
        forward=tuple((name_of(one.owner), one.reason or '') for one in learners if one.forward))
    for one in learners:
        note_loop(one.owner, loop.where, steps, one.reason, loop.how_often)
    _known.pop(loop, None)
    _known[loop] = None
    if len(_known) > _MOST:
        _known.pop(next(iter(_known)))
    seen = watching.get()
    if seen is not None:
        seen.append(loop)
