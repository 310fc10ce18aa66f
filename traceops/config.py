# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings: process-wide, for a block, or from the environment.

A learner keeps the settings it was made with, so no compiled program can go stale when they
change later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from traceops.errors import SettingsError

__all__ = ['ENVIRONMENT', 'Settings', 'configure', 'configured', 'reset', 'settings']

_PRECISIONS = ('highest', 'high', 'default')
_BACKENDS = ('auto', 'jax')
_UNITS = {'': 1, 'B': 1, 'KIB': 2 ** 10, 'MIB': 2 ** 20, 'GIB': 2 ** 30,
          'KB': 10 ** 3, 'MB': 10 ** 6, 'GB': 10 ** 9}

#: Environment variable of each setting.
ENVIRONMENT = {
    'window': 'TRACEOPS_WINDOW',
    'memory_budget': 'TRACEOPS_MEMORY_BUDGET',
    'carry_trace': 'TRACEOPS_CARRY_TRACE',
    'precision': 'TRACEOPS_PRECISION',
    'backend': 'TRACEOPS_BACKEND',
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How learners made from now on run.

    Parameters
    ----------
    window : int or None
        Steps per window; ``None`` chooses the longest that fits ``memory_budget``.
    memory_budget : int or str
        Bytes for the recorded factors of one window, e.g. ``'256MiB'``.
    carry_trace : bool
        D-RTRL only. ``True`` (upstream's semantics): the trace enters and leaves each call.
        ``False``: each call starts from a zero trace and no trace is ever allocated.
    precision : {'highest', 'high', 'default'}
        Of the product that forms the weight gradient.
    backend : {'auto', 'jax'}
        Where the window operations run.
    """

    window: int | None = None
    memory_budget: int = 256 * 2 ** 20
    carry_trace: bool = True
    precision: str = 'highest'
    backend: str = 'auto'

    def __post_init__(self) -> None:
        window, carry = self.window, self.carry_trace
        if window is not None and (isinstance(window, bool) or not isinstance(window, int)
                                   or window < 1):
            raise _illegal('window', window, 'a positive int, or None to choose', 'window=50')
        object.__setattr__(self, 'memory_budget', _bytes(self.memory_budget))
        if not isinstance(carry, bool):
            raise _illegal('carry_trace', carry, 'True or False', 'carry_trace=False')
        if self.precision not in _PRECISIONS:
            raise _illegal('precision', self.precision, _PRECISIONS, "precision='highest'")
        if self.backend not in _BACKENDS:
            raise _illegal('backend', self.backend, _BACKENDS, "backend='auto'")


def _illegal(field: str, value: Any, legal: Any, example: str) -> SettingsError:
    return SettingsError(f'{field}={value!r} is not legal; it takes {legal}, '
                         f'e.g. traceops.configure({example}).')


def _bytes(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*', value) \
        if isinstance(value, str) else None
    if match and match.group(2).upper() in _UNITS and float(match.group(1)) > 0:
        return max(1, int(float(match.group(1)) * _UNITS[match.group(2).upper()]))
    raise _illegal('memory_budget', value, "a positive number of bytes, or a text like '256MiB'",
                   "memory_budget='1GiB'")


_lock = threading.Lock()
_process: dict[str, Any] = {}
_block: ContextVar[dict[str, Any]] = ContextVar('traceops_settings', default={})  # noqa: B039


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, name in ENVIRONMENT.items():
        text = os.environ.get(name, '').strip()
        if not text:
            continue
        if field == 'window':
            if text.lower() == 'none':
                continue
            if not text.isdigit():
                raise SettingsError(f'{name}={text!r} is not legal; it takes a positive int or '
                                    f'none, e.g. {name}=50.')
            found[field] = int(text)
        elif field == 'carry_trace':
            flags = {'1': True, 'true': True, 'yes': True, '0': False, 'false': False, 'no': False}
            if text.lower() not in flags:
                raise SettingsError(f'{name}={text!r} is not legal; it takes one of '
                                    f'{sorted(flags)}, e.g. {name}=0.')
            found[field] = flags[text.lower()]
        else:
            found[field] = text
    return found


def _known(options: dict[str, Any]) -> None:
    names = [f.name for f in dataclasses.fields(Settings)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise SettingsError(f'unknown setting {", ".join(map(repr, unknown))}; known: '
                            f'{", ".join(names)}, e.g. traceops.configure(window=50).')


def settings() -> Settings:
    """The settings in force: of the block, else of the process, else of the environment."""
    return Settings(**{**_from_environment(), **_process, **_block.get()})


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
    _known(options)
    with _lock:
        Settings(**{**_from_environment(), **_process, **options})
        _process.update(options)
    return settings()


def reset() -> Settings:
    """Forget every :func:`configure` of this process."""
    with _lock:
        _process.clear()
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
    inner = {**_block.get(), **options}
    now = Settings(**{**_from_environment(), **_process, **inner})
    token = _block.set(inner)
    try:
        yield now
    finally:
        _block.reset(token)
