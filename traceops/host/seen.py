# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What was done with fast learners, for ``explain``: plain words, which keep no learner alive."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from traceops.reasons import Reason, instead_of

__all__ = ['BY_HAND', 'LOOP', 'Call', 'Calls', 'belong_to_a_loop', 'caller', 'in_a_loop',
           'is_in_a_loop', 'known', 'name_of', 'note', 'note_loop', 'raised_at', 'watching']

BY_HAND, LOOP = 'a step by hand', 'a loop by hand'


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a learner, when it was traced or run.

    Attributes
    ----------
    where : str
        File, line and function that made it.
    what : str
        ``'etrace_grad'``, ``'etrace_evolve'``, ``'a step by hand'`` or, among the calls of a
        learner, ``'a loop by hand'``.
    learner : str
    steps : int
    engine : str
        ``'window'``, or ``'per-step'``: as upstream runs it.
    reason : str
        How long windows are; why it is not a window.
    from_zero : bool
        The trace that entered was known to be zero.
    """

    where: str
    what: str
    learner: str
    steps: int
    engine: str
    reason: str
    from_zero: bool = False

    @property
    def instead(self) -> str:
        """What to write instead, where it is not a window; else empty."""
        return instead_of(self.reason)


watching: ContextVar[list[Call] | None] = ContextVar('traceops_watching_calls', default=None)
_in_a_loop: ContextVar[bool] = ContextVar('traceops_in_a_loop', default=False)
_known: dict[Call, None] = {}
_MOST = 256                     # calls that are remembered, of all learners and of each


def known() -> tuple[Call, ...]:
    """The calls that this process has seen, the oldest first."""
    return tuple(_known)


def note(learner: Any, what: str, steps: int, engine: str, reason: str,
         from_zero: bool = False) -> None:
    """Remember a call: of the process, of the learner, and for who watches."""
    call = Call(caller(), what, name_of(learner), steps, engine, reason, from_zero)
    books: list[dict[Call, None]] = [_known, learner._calls.book]
    if what == BY_HAND:
        learner._calls.by_hand.append((call, [book for book in books if call not in book]))
        del learner._calls.by_hand[:-_MOST]
    else:
        learner._last_call = (engine, reason)
    for book in books:
        _remember(book, call)
    seen = watching.get()
    if seen is not None:
        seen.append(call)


def note_loop(learner: Any, where: str, steps: int, reason: Reason | None,
              how_often: str) -> None:
    """Remember a loop around a learner, of the learner alone: loops have a list of their own."""
    _remember(learner._calls.book, Call(
        where, LOOP, name_of(learner), steps, 'per-step' if reason else 'window',
        reason or how_often))


def belong_to_a_loop(learner: Any, steps: int) -> None:
    """The last steps by hand were those of a loop's body, which was traced before the loop was."""
    found = learner._calls.by_hand
    last, found[:] = found[max(len(found) - steps, 0):], found[:max(len(found) - steps, 0)]
    seen = watching.get()
    for call, books in last:
        for book in books:
            book.pop(call, None)
        if seen is not None and call in seen:
            seen.remove(call)


def _remember(book: dict[Call, None], call: Call) -> None:
    book.pop(call, None)
    book[call] = None
    if len(book) > _MOST:
        book.pop(next(iter(book)))


class Calls:
    """The calls of one learner, the oldest first, and how many were made outside jit."""

    def __init__(self) -> None:
        self.book: dict[Call, None] = {}
        #: The last steps by hand, and the books that had no call like it.
        self.by_hand: list[tuple[Call, list[dict[Call, None]]]] = []
        self.outside_jit = 0

    def __iter__(self) -> Iterator[Call]:
        return iter(self.book)


@contextlib.contextmanager
def in_a_loop() -> Iterator[None]:
    """Steps of this block are those of a loop, which is told of as a whole."""
    token = _in_a_loop.set(True)
    try:
        yield
    finally:
        _in_a_loop.reset(token)


def is_in_a_loop() -> bool:
    """Whether a step taken now is one of a loop."""
    return _in_a_loop.get()


def name_of(learner: Any) -> str:
    """A learner in words."""
    return f'{type(learner).__name__} of {type(learner.graph_executor.model).__name__}'


_LIBRARIES = ('jax', 'brainstate', 'braintrace', 'brainpy', 'saiunit', 'traceops', 'contextlib',
              'functools')


def caller() -> str:
    """File, line and function of the nearest code that is no library's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if _is_the_users(frame):
            return _place(frame, frame.f_lineno)
        frame = frame.f_back
    return 'unknown'


def raised_at(err: BaseException) -> str:
    """The same of what raised an error."""
    found = [_place(frame, line) for frame, line in traceback.walk_tb(err.__traceback__)
             if _is_the_users(frame)]
    return found[-1] if found else 'unknown'


def _is_the_users(frame: Any) -> bool:
    return frame.f_globals.get('__name__', '').split('.')[0] not in _LIBRARIES


def _place(frame: Any, line: int) -> str:
    return f'{frame.f_code.co_filename}:{line} in {frame.f_code.co_qualname}'
