# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Patches that are undone whatever happens around them.

Other tools patch the same places, in any order; modules are imported again; blocks are closed in
other threads. So what is known of a patch hangs on the patch itself, a function that hands every
call through unless it is the one in use; and only what is still ours is undone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

__all__ = ['Patches', 'Place', 'adopt']

_MARK = '__traceops_patches__'


@dataclasses.dataclass(frozen=True)
class Place:
    """An attribute that is patched.

    Attributes
    ----------
    owner : class or module
    name : str
    instead : callable
        ``(original, *args, **kwargs)``: what is called in its stead.
    """

    owner: Any
    name: str
    instead: Callable[..., Any]

    @property
    def key(self) -> tuple[Any, str]:
        return self.owner, self.name

    @property
    def now(self) -> Any:
        """What the owner itself has there, if anything."""
        return vars(self.owner).get(self.name)

    def inherited(self) -> Callable[..., Any]:
        """What a class has from its bases there."""
        @functools.wraps(getattr(self.owner, self.name))
        def method(one: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(super(self.owner, one), self.name)(*args, **kwargs)
        return method


def _over(function: Any) -> Iterator[Any]:
    """A function and what it says it wraps, outermost first."""
    for _ in range(100):
        if function is None:
            return
        yield function
        function = getattr(function, '__wrapped__', None)


class Patches:
    """The patches of this process, and who uses them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.installed = False
        #: Blocks that are open, anywhere; a context knows those that were opened in it.
        self.open: set[object] = set()
        self.entered: ContextVar[tuple[object, ...]] = ContextVar('traceops_enabled', default=())
        self.places: Sequence[Place] = ()
        #: Of each place, the patch in use; and every patch made, with what it was put over.
        self.used: dict[Any, Any] = {}
        self.made: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def active(self) -> bool:
        """Whether the patches act here and now."""
        return self.installed or any(one in self.open for one in self.entered.get())

    def install(self) -> None:
        """Act everywhere, until :meth:`uninstall`."""
        with self.lock:
            self.installed = True
            self._apply()

    def uninstall(self) -> None:
        """Act nowhere any more: all blocks end."""
        with self.lock:
            self.installed = False
            self.open.clear()
            self._apply()

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Act in this context, until the block is left, from wherever that is."""
        one = object()
        self.entered.set((*self.entered.get(), one))
        try:
            with self.lock:
                self.open.add(one)
                self._apply()
            yield
        finally:
            # no token: blocks may end in any order, and in another context than they began in
            self.entered.set(tuple(other for other in self.entered.get() if other is not one))
            with self.lock:
                self.open.discard(one)
                self._apply()

    def mend(self) -> None:
        """Put back what another tool has taken away while the patches are in use."""
        if any(place.now is not self.used.get(place.key) for place in self.places):
            with self.lock:
                self._apply()

    @property
    def _wanted(self) -> bool:
        return self.installed or bool(self.open)

    def _apply(self) -> None:
        put = None
        while put is not self._wanted:      # a block may end meanwhile, where garbage is collected
            put = self._wanted
            for place in self.places:
                if put:
                    self._put(place)
                else:
                    self._take_away(place)

    def _put(self, place: Place) -> None:
        now = place.now
        if now in self.made:
            self.used[place.key] = now
        elif not any(one is self.used.get(place.key) for one in _over(now)):
            self.used[place.key] = patch = self._patch(place, now or place.inherited())
            self.made[patch] = now
            setattr(place.owner, place.name, patch)

    def _take_away(self, place: Place) -> None:
        self.used.pop(place.key, None)
        while place.now in self.made:       # else it stays, beneath the patch of another tool
            original = self.made[place.now]
            if original is None:
                delattr(place.owner, place.name)
            else:
                setattr(place.owner, place.name, original)

    def _patch(self, place: Place, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def patch(*args: Any, **kwargs: Any) -> Any:
            if self.used.get(place.key) is not patch or not self.active():
                return original(*args, **kwargs)
            return self.instead(place.key)(original, *args, **kwargs)

        # what a pickle names is found where it was put
        if isinstance(place.owner, type):
            patch.__qualname__ = f'{place.owner.__qualname__}.{place.name}'
            patch.__module__ = place.owner.__module__
        else:
            patch.__module__ = place.owner.__name__
        setattr(patch, _MARK, self)
        return patch

    def instead(self, key: Any) -> Callable[..., Any]:
        """What is called at a place, as the module that was imported last has it."""
        return next(place.instead for place in self.places if place.key == key)


def adopt(places: Sequence[Place]) -> Patches:
    """The patches of this process, to act as these places say: those of an earlier import of this
    package, if it left any, else new ones."""
    found = Patches()
    for place in places:
        for one in _over(place.now):
            found = getattr(one, _MARK, found)
    found.places = places
    return found
