# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""install and uninstall: which class a new learner gets.

Two places of braintrace are patched, both ``__init__``: an object on its way into the world
becomes one of the fast subclass of its class. Every way to make a learner passes there,
references taken before install included, and undoing it puts the two attributes back.
(``__new__`` would be the obvious place, but Python does not forget a ``__new__`` once set.)
The third place is ``jax.lax.scan``, underneath every loop over time: :mod:`traceops.host.loops`
looks at what it is given.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import braintrace
import jax

from traceops import config
from traceops.host import loops, upstream, versions
from traceops.host.learners import FastLearner, FastVmap, fast_class

__all__ = ['accelerate', 'compile', 'enabled', 'install', 'installed', 'uninstall']

_lock = threading.RLock()
_installed = False
_users = 0                                          # blocks of enabled() now open
_depth: ContextVar[int] = ContextVar('traceops_enabled', default=0)
#: In the key of jit's caches: a program made in a block is not one made outside.
_block_key = jax.make_user_context(False)


def _init_learner(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        fast = None if isinstance(self, FastLearner) or not _active() else fast_class(type(self))
        if fast is None:
            original(self, *args, **kwargs)
            return
        self.__class__ = fast
        original(self, *args, **kwargs)
        self._become_fast()

    return __init__


def _init_vmap(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is upstream.ETraceVmap and isinstance(module, FastLearner) and _active():
            self.__class__ = FastVmap
        original(self, module, *args, **kwargs)

    return __init__


def _scan(original: Any) -> Any:
    @functools.wraps(original)
    def scan(*args: Any, **kwargs: Any) -> Any:
        return loops.scan(original, *args, **kwargs) if _active() else original(*args, **kwargs)

    return scan


_PATCHES = ((upstream.VjpAlgorithm, '__init__', _init_learner),
            (upstream.ETraceVmap, '__init__', _init_vmap),
            (jax.lax, 'scan', _scan))
_saved: dict[Any, Any] = {}


def _active() -> bool:
    return _installed or _depth.get() > 0


def _apply() -> None:
    """Bring the patches in line with whether anybody uses them."""
    wanted = _installed or _users > 0
    for place, name, wrap in _PATCHES:
        if wanted and place not in _saved:
            _saved[place] = vars(place).get(name)
            setattr(place, name, wrap(getattr(place, name)))
        elif not wanted and place in _saved:
            original = _saved.pop(place)
            if original is None:
                delattr(place, name)
            else:
                setattr(place, name, original)


def install(**settings: Any) -> None:
    """Make the learners of this process fast from now on. Idempotent.

    Parameters
    ----------
    **settings
        As for :func:`traceops.configure`.

    Raises
    ------
    UnsupportedVersionError
        braintrace or jax is outside the supported range; nothing is patched.
    SettingsError
        Unknown setting or illegal value; nothing is patched.
    """
    global _installed
    versions.check()
    if settings:
        config.configure(**settings)
    with _lock:
        _installed = True
        _apply()


def uninstall() -> None:
    """Undo :func:`install`: braintrace is as it was. Learners made fast stay fast. Idempotent."""
    global _installed
    with _lock:
        _installed = False
        _apply()


def installed() -> bool:
    """Whether a learner made here and now would be fast."""
    return _active()


@contextlib.contextmanager
def enabled(**settings: Any) -> Iterator[None]:
    """Make the learners of a block fast (this thread or task only). Nests.

    Parameters
    ----------
    **settings
        As for :func:`traceops.configured`.
    """
    global _users
    versions.check()
    with config.configured(**settings):
        with _lock:
            _users += 1
            _apply()
        token = _depth.set(_depth.get() + 1)
        try:
            with _block_key(True):
                yield
        finally:
            _depth.reset(token)
            with _lock:
                _users -= 1
                _apply()


def accelerate(fn: Callable[..., Any] | None = None, /, **settings: Any) -> Any:
    """A function whose learners and loops are fast, nothing left patched behind.

    Parameters
    ----------
    fn : callable
        E.g. a ``train_step`` that makes a learner and loops over time. Outermost: around
        ``jit``, if there is one.
    **settings
        As for :func:`traceops.configured`.

    Returns
    -------
    callable
        ``fn`` in a block of :func:`enabled`; without ``fn``, a decorator.

    Examples
    --------
    >>> @traceops.accelerate
    ... @brainstate.transform.jit
    ... def train_step(inputs, targets): ...
    """
    if fn is None:
        return functools.partial(accelerate, **settings)
    if not callable(fn):
        raise TypeError(f'accelerate() takes a function, or settings by name as in '
                        f'@traceops.accelerate(window=50); got {type(fn).__name__}.')

    @functools.wraps(fn)
    def accelerated(*args: Any, **kwargs: Any) -> Any:
        with enabled(**settings):
            return fn(*args, **kwargs)

    return accelerated


def compile(*args: Any, **kwargs: Any) -> Any:  # noqa: A001  (upstream's name)
    """:func:`braintrace.compile` with the fast path, nothing left patched behind.

    Parameters and results are those of :func:`braintrace.compile`.
    """
    with enabled():
        return braintrace.compile(*args, **kwargs)

