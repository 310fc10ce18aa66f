# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What the two rules share.

A rule has a *carry* (what enters and leaves a window: the trace, or nothing) and turns the
record of a window into weight gradients. ``adjoint-form`` in the design notes has the algebra.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from traceops.engine.windows import room
from traceops.host.relations import RelationView, gradient_bytes, relation_views, weight_bytes
from traceops.kernels.layout import steps_of

__all__ = ['Carry', 'Grads', 'Rule', 'following', 'whole', 'with_every_step']

Carry = dict[str, Any]
Grads = dict[Any, Any]

#: Bytes of a record that are still there when its gradient is formed.
_IN_CACHE = 2 ** 24


def following(a: Any) -> Any:
    """``a_{t+1}`` at ``t``, zero after the last step."""
    return jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])


def whole(record: Any, steps: int | None = None) -> Any:
    """A record ``[T, ...]`` in which what came once (``[1, ...]``) is repeated."""
    if steps is None:
        steps = steps_of(record)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (steps, *a.shape[1:])), record)


def with_every_step(record: Any, given: Any) -> Any:
    """Parts of a record, of which one array at least has every step."""
    steps = steps_of(record)
    has = any(a.shape[0] == steps for a in jax.tree.leaves(given))
    return given if has else whole(given, steps)


class Rule(abc.ABC):
    """Of a learner, with or without lanes; ``at_once``: steps are folded together."""

    factorised = False
    #: Whether steps are folded from the last to the first.
    backward = False
    #: Steps without a loss were gone through again, in the place of the trace that they made.
    recalled = False

    def __init__(self, learner: Any, lanes: bool, at_once: bool = False) -> None:
        self.learner, self.lanes, self.at_once = learner, lanes, at_once
        self.views = relation_views(learner)
        self.precision = learner.traceops_settings.precision
        self.backend = learner.traceops_settings.backend

    @property
    def stores(self) -> bool:
        """Whether what leaves the last window is kept in states."""
        return True

    @property
    def folds(self) -> bool:
        """Whether the record of a step is folded before it is stored."""
        return not self.at_once

    @property
    def budget(self) -> int:
        """Bytes of ``memory_budget``, or what is chosen where it is left open."""
        return int(self.learner.traceops_settings.budget(self.at_once))

    def room(self, more: int = 0) -> int:
        """Bytes of ``memory_budget`` for what grows with the length of a window.

        ``more``: bytes of what does not, besides the rule's own.
        """
        return room(self.budget, self.fixed_bytes + more)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that the gradients of a window need however long it is.

        Those of a window, beside the sum of them; and once more, in another order or of one of
        two ways to form them.
        """
        return 2 * gradient_bytes(self.learner)

    @property
    def copied_bytes(self) -> int:
        """Bytes that a step adds to the record where its gradients are formed."""
        return 0

    def window_budget(self, more: int = 0) -> int:
        """Bytes for the record of a window whose length is not given; ``more`` as for `room`.

        No more than stays in cache, if that is much more than the gradient: where windows cost
        little beside their steps (on a CPU), the sum of their gradients.
        """
        left = self.room(more)
        return min(left, self._cached) if self.windows_are_cheap else left

    @property
    def _cached(self) -> int:
        return max(_IN_CACHE, 4 * weight_bytes(self.learner))

    @property
    def bound(self) -> str:
        """What bounds the record of a window whose length is not given, in words."""
        budget, left = self.budget, self.room()
        if self.windows_are_cheap and self._cached < left:
            return f'the cache, {self._cached / 2 ** 20:.2f} MiB'
        said = f'memory_budget, {budget / 2 ** 20:.2f} MiB'
        if self.fixed_bytes < budget / 100:
            return said
        return f'{said}, beside {self.fixed_bytes / 2 ** 20:.2f} MiB of gradients and traces'

    @property
    def windows_are_cheap(self) -> bool:
        """Whether a window costs little beside its steps."""
        return self.folds

    @property
    def in_loop(self) -> tuple[Any, ...]:
        """The states of the tape that are folded inside the loop that simulates."""
        return self.learner._recorder.tape if self.folds and not self.backward else ()

    @property
    def paths(self) -> tuple[Any, ...]:
        """Parameters that the rule gives a gradient."""
        return tuple(dict.fromkeys(p for v in self.views for p in v.paths))

    def _feeding(self, group: int) -> list[RelationView]:
        return [v for v in self.views if group in v.groups]

    @abc.abstractmethod
    def inner(self, carry: Carry) -> Any:
        """What :meth:`fold_step` starts with, of what enters the window."""

    @abc.abstractmethod
    def fold_step(self, inner: Any, record: Any) -> tuple[Any, Any]:
        """One step's record: fold it into ``inner``, keep what :meth:`close` needs."""

    @abc.abstractmethod
    def fold_window(self, carry: Carry, record: Any, index: Any) -> tuple[Any, Any]:
        """The same for the record of a window, ``[T, ...]``; ``index`` is that of its start."""

    @abc.abstractmethod
    def close(self, carry: Carry, inner: Any, record: Any, weight_vals: Any,
              index: Any) -> tuple[Grads, Carry]:
        """Weight gradients of the window, of what was folded, and what leaves it."""

    def _gradient(self, view: RelationView, weight_vals: Any, x: Any,
                  cotangent: Any) -> dict[str, Any]:
        """Of one relation's operands, by the product that the learner's settings ask for."""
        return view.gradient(weight_vals, x, cotangent, self.precision, self.backend,
                             view.of_events)

    def _over_lanes(self, fn: Any, *args: Any, axes: Any = 0) -> Any:
        return jax.vmap(fn, in_axes=axes)(*args) if self.lanes else fn(*args)
