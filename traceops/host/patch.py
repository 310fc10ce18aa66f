# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""install and uninstall: which learners are fast.

Two places of braintrace are patched, both ``__init__``: every way to make a learner passes there,
references taken before install included. (``__new__`` would be the obvious place, but Python does
not forget a ``__new__`` once set.) The third place is ``jax.lax.scan``, underneath every loop over
time: :mod:`traceops.host.loops` looks at what it is given. :mod:`traceops.host.places` patches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import braintrace
import jax

from traceops import config
from traceops.host import loops, places, upstream, versions
from traceops.host.learners import make_fast, make_fast_vmap

__all__ = ['accelerate', 'compile', 'enabled', 'install', 'installed', 'uninstall']


def _init_learner(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    make_fast(self, functools.partial(original, self), *args, **kwargs)
    _patches.mend()         # another tool may have put back what it found before install()


def _init_vmap(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    make_fast_vmap(self, functools.partial(original, self), *args, **kwargs)


_patches = places.adopt((
    places.Place(upstream.VjpAlgorithm, '__init__', _init_learner),
    places.Place(upstream.ETraceVmap, '__init__', _init_vmap),
    places.Place(jax.lax, 'scan', loops.scan)))
_saved = _patches.used                      # empty when nothing is patched


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
    versions.check()
    if settings:
        config.configure(**settings)
    _patches.install()


def uninstall() -> None:
    """Undo :func:`install`, and end every block of :func:`enabled`: braintrace and jax are as they
    were. Learners made fast stay fast. Idempotent.

    Where another tool has since put a patch over one of traceops', that one stays beneath it and
    hands every call through.
    """
    _patches.uninstall()


def installed() -> bool:
    """Whether a learner made here and now would be fast."""
    return _patches.active()


@contextlib.contextmanager
def enabled(**settings: Any) -> Iterator[None]:
    """Make the learners of a block fast (this thread or task only). Nests.

    The block ends where it is left: a generator that opened it may be closed in another thread.

    Parameters
    ----------
    **settings
        As for :func:`traceops.configured`.
    """
    versions.check()
    with config.configured(**settings), _patches.block():
        yield


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

    accelerated.traceops_settings = settings        # type: ignore[attr-defined]
    return accelerated


def compile(*args: Any, **kwargs: Any) -> Any:  # noqa: A001  (upstream's name)
    """:func:`braintrace.compile` with the fast path, nothing left patched behind.

    Parameters and results are those of :func:`braintrace.compile`.
    """
    with enabled():
        return braintrace.compile(*args, **kwargs)

