# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings: process-wide, for a block, or from the environment.

A learner keeps the settings it was made with, so no compiled program can go stale when they
change later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from traceops import memory
from traceops.errors import SettingsError

__all__ = ['ENVIRONMENT', 'Settings', 'configure', 'configured', 'install_asked', 'reset',
           'settings']

_UNITS = {'': 1, 'B': 1, 'KIB': 2 ** 10, 'MIB': 2 ** 20, 'GIB': 2 ** 30,
          'KB': 10 ** 3, 'MB': 10 ** 6, 'GB': 10 ** 9}

#: Environment variable of each setting.
ENVIRONMENT = {
    'window': 'TRACEOPS_WINDOW',
    'memory_budget': 'TRACEOPS_MEMORY_BUDGET',
    'carry_trace': 'TRACEOPS_CARRY_TRACE',
    'precision': 'TRACEOPS_PRECISION',
    'backend': 'TRACEOPS_BACKEND',
    'two_phase': 'TRACEOPS_TWO_PHASE',
    'reuse_memory': 'TRACEOPS_REUSE_MEMORY',
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How learners made from now on run.

    Parameters
    ----------
    window : int or None
        Steps per window; ``None`` chooses the longest that fits ``memory_budget`` and, where
        windows cost little beside their steps (on a CPU, no trace carried), stays in cache.
    memory_budget : int, str or None
        Bytes for the recorded factors of one window, e.g. ``'256MiB'``. ``None``: that, or 1 GiB
        where the record of a window is used together (see ``two_phase``): there a window more
        costs launches, and a GPU has the memory.
    carry_trace : bool
        D-RTRL only. ``True`` (upstream's semantics): the trace enters and leaves each call.
        ``False``: each call starts from a zero trace and no trace is ever allocated.
    precision : {'highest', 'bf16x3', 'bf16x2', 'tf32'}
        Of the product that forms the weight gradient, as :func:`traceops.ops.trace_gradient`
        takes it. ``'highest'`` is exact for any input.
    backend : {'auto', 'jax', 'triton'}
        What runs the operations of ``traceops.ops``. ``'auto'`` chooses by platform and never
        fails; a backend that is named works or raises. A compiled function keeps the one that
        was in force when it was traced.
    two_phase : bool or None
        How the record of a window is used after the loop over time, which only simulates.
        ``True``: Jacobians and learning signals of all steps are stored and used together.
        ``False``: a step at a time, most of them never stored. ``None``: together on a GPU, where
        the launches of a step cost more than its arithmetic. There the loop takes five steps an
        iteration, and what it keeps of them is stored at once.
    reuse_memory : bool
        ``True``: from the first learner made with it on, the process keeps the memory that it
        frees until it ends, so that the arrays of a call are not touched anew in the next. Needs
        glibc. ``traceops doctor`` counts what that saves.
    """

    window: int | None = None
    memory_budget: int | None = None
    carry_trace: bool = True
    precision: str = 'highest'
    backend: str = 'auto'
    two_phase: bool | None = None
    reuse_memory: bool = False

    def __post_init__(self) -> None:
        for field, (legal, example, read) in _FIELDS.items():
            value = getattr(self, field)
            try:
                object.__setattr__(self, field, read(value))
            except (TypeError, ValueError):
                raise SettingsError(f'{field}={value!r} is not legal; it takes {legal}, e.g. '
                                    f'traceops.configure({field}={example!r}).') from None

    def budget(self, together: bool) -> int:
        """Bytes of ``memory_budget``; ``together``: the record of a window is used together."""
        return self.memory_budget or (2 ** 30 if together else 2 ** 28)


def _window(value: Any) -> int | None:
    return None if value is None else _positive(value)


def _positive(value: Any) -> int:
    number = operator.index(value)
    if isinstance(value, bool) or number < 1:
        raise ValueError
    return number


def _bytes(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return _positive(value)
    match = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*', value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError
    return _positive(int(float(match[1]) * _UNITS[match[2].upper()]))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _reused(value: Any) -> bool:
    if _flag(value) and not memory.able():
        raise ValueError
    return bool(value)


def _one_of(*words: str) -> tuple[str, str, Callable[[Any], str]]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError
        return value
    return ' or '.join(map(repr, words)), words[0], read


#: Of each setting: what is legal, an example, and the function that reads or refuses a value.
_FIELDS: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    'window': ('a positive int, or None to choose', 50, _window),
    'memory_budget': ("a positive number of bytes, a text like '256MiB', or None to choose",
                      '1GiB', _bytes),
    'carry_trace': ('True or False', False, _flag),
    'precision': _one_of('highest', 'bf16x3', 'bf16x2', 'tf32'),
    'backend': _one_of('auto', 'jax', 'triton'),
    'two_phase': ('True, False, or None to choose', True,
                  lambda value: None if value is None else _flag(value)),
    'reuse_memory': ('True (with glibc, which Linux usually has) or False', False, _reused),
}


@dataclasses.dataclass(eq=False)
class _Block:
    """Options of one block. A context may still know of a block that was left in another one."""

    options: dict[str, Any]
    open: bool = True


_lock = threading.Lock()
_process: dict[str, Any] = {}                           # replaced as a whole, never changed
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar('traceops_settings', default=())

_WORDS = {'1': True, 'true': True, 'yes': True, 'on': True,
          '0': False, 'false': False, 'no': False, 'off': False}


def _from_text(field: str, text: str) -> Any:
    if field in ('window', 'memory_budget', 'two_phase') and text.lower() == 'none':
        return None
    if field == 'window':
        return int(text)
    if field in ('carry_trace', 'two_phase', 'reuse_memory'):
        return _WORDS.get(text.lower(), text)
    return text


def _from_environment() -> dict[str, Any]:
    """Settings named by environment variables, read at each use; an empty one is not set."""
    found: dict[str, Any] = {}
    for field, name in ENVIRONMENT.items():
        text = os.environ.get(name, '').strip()
        if not text:
            continue
        legal, example, read = _FIELDS[field]
        try:
            found[field] = read(_from_text(field, text))
        except (TypeError, ValueError):
            raise SettingsError(f'the environment variable {name}={text!r} is not legal; '
                                f'{field} takes {legal}, e.g. {name}={example}.') from None
    return found


def install_asked() -> bool:
    """Whether the environment asks to install at import (``TRACEOPS_INSTALL``).

    Raises
    ------
    SettingsError
        The variable holds a text that is neither yes nor no.
    """
    text = os.environ.get('TRACEOPS_INSTALL', '').strip()
    if text and text.lower() not in _WORDS:
        raise SettingsError(f'the environment variable TRACEOPS_INSTALL={text!r} is not legal; it '
                            f'takes {", ".join(_WORDS)}, e.g. TRACEOPS_INSTALL=1.')
    return _WORDS.get(text.lower(), False)


def _in_force(options: dict[str, Any]) -> Settings:
    return Settings(**(_from_environment() | _process | options))


def _known(options: dict[str, Any]) -> None:
    unknown = sorted(set(options) - set(_FIELDS))
    if unknown:
        raise SettingsError(f'unknown setting {", ".join(map(repr, unknown))}; known: '
                            f'{", ".join(_FIELDS)}, e.g. traceops.configure(window=50).')


def settings() -> Settings:
    """The settings in force: of the block, else of the process, else of the environment."""
    return _in_force(_of_blocks())


def _of_blocks() -> dict[str, Any]:
    return {k: v for block in _blocks.get() if block.open for k, v in block.options.items()}


def configure(**options: Any) -> Settings:
    """Set options for the process; learners made from now on use them.

    Parameters
    ----------
    **options
        Fields of :class:`Settings`.

    Returns
    -------
    Settings
        The settings now in force.

    Raises
    ------
    SettingsError
        Unknown option or illegal value; nothing is changed then.
    """
    global _process
    _known(options)
    with _lock:
        _in_force(options)
        _process = _process | options
    return settings()


def reset() -> Settings:
    """Forget every :func:`configure` of this process."""
    global _process
    with _lock:
        _process = {}
    return settings()


@contextlib.contextmanager
def configured(**options: Any) -> Iterator[Settings]:
    """Set options for a block (this thread or task only); nests.

    Raises
    ------
    SettingsError
        Unknown option or illegal value.
    """
    _known(options)
    now = _in_force({**_of_blocks(), **options})
    block = _Block(options)
    _blocks.set((*_blocks.get(), block))
    try:
        yield now
    finally:
        # no token: blocks may end in any order, and in another context than they began in
        block.open = False
        _blocks.set(tuple(other for other in _blocks.get() if other is not block))
