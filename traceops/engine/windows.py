# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The length of a window, and the loop over windows, forward or backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from traceops.compiler.program import Fold, StepProgram

__all__ = ['choose_window', 'room', 'run_windows', 'run_windows_back']


def room(budget: int, fixed: int) -> int:
    """Bytes of a budget for what grows with the length of a window.

    The ``fixed`` ones are taken off. Where little is left then, half as much as they are: shorter
    windows would take longer, and save little beside them.
    """
    return max(budget - fixed, min(budget, fixed // 2))


def choose_window(length: int, step_bytes: int, window: int | None, budget: int) -> int:
    """Steps per window: as requested, else the longest whose record fits the budget.

    Between that and half of it, a length that divides the sequence is preferred: a shorter last
    window is a second program to compile.
    """
    if window is not None:
        return min(window, length)
    longest = max(1, min(length, budget // max(step_bytes, 1)))
    for K in range(longest, longest // 2, -1):
        if length % K == 0:
            return K
    return longest


def run_windows(program: StepProgram, xs: Any, K: int, carry: Any,
                after_window: Callable[..., Any],
                fold_of: Callable[..., Fold | None] = lambda carry: None,
                ) -> tuple[Any, Any, Any, Any]:
    """Simulate ``xs`` in windows of ``K`` steps; use each record before the next.

    Parameters
    ----------
    program : StepProgram
        The recorded step; its states are read.
    xs : pytree of arrays, ``[T, ...]``
        Arguments of the step.
    K : int
        Steps per window.
    carry : pytree
        Carried from window to window beside the states.
    after_window : callable
        ``(carry, outputs of the window, carry and results of its fold, states before it) ->
        (carry, kept outputs)``.
    fold_of : callable, optional
        ``carry -> the fold of the window`` (see :meth:`StepProgram.scan`).

    Returns
    -------
    states, carry, sums, outputs
        ``states`` are for :meth:`StepProgram.store`; ``sums`` are the outputs that add up over
        steps; ``outputs`` are concatenated over windows, ``[T, ...]``.
    """
    program = program.with_constants()
    states, sums = program.initial()

    def window(full: Any, xs_w: Any) -> Any:
        states, sums, carry = full
        before = program.by_id(states)
        states, sums, *out = program.scan(states, sums, xs_w, fold_of(carry))
        carry, kept = after_window(carry, *out, before)
        return (states, sums, carry), kept

    full, outputs = (states, sums, carry), []
    head, rest = _cut(xs, K)
    count = _length(head)
    if count == 1 or (count and _changes(window, full, head)):
        full, out = window(full, jax.tree.map(lambda a: a[0], head))
        outputs.append(jax.tree.map(lambda a: a[None], out))
        head, count = jax.tree.map(lambda a: a[1:], head), count - 1
    if count:
        full, out = jax.lax.scan(window, full, head)
        outputs.append(out)
    if rest is not None:
        full, out = window(full, rest)
        outputs.append(jax.tree.map(lambda a: a[None], out))
    states, sums, carry = full
    return states, carry, sums, _joined(outputs)


def run_windows_back(program: StepProgram, xs: Any, K: int,
                     after_window: Callable[..., Any], carry: Any,
                     fold_of: Callable[..., Fold | None] = lambda carry: None,
                     record: bool = False) -> tuple[Any, Any, Any, Any]:
    """As :func:`run_windows`, with the windows taken from the last to the first.

    A first pass only simulates and keeps the states at the start of each window, and the results of
    effects. Each window is then simulated again without its effects. With ``record`` the first pass
    also keeps what windows are recomputed from, and nothing is simulated twice. ``carry`` passes
    from a window to the one before it.
    """
    program = program.with_constants()
    states, sums = program.initial()
    head, rest = _cut(xs, K)

    def ahead(states: Any, xs_w: Any) -> Any:
        after, known = (program.ahead if record else program.advance)(states, xs_w)
        return after, (states, known)

    states, given = jax.lax.scan(ahead, states, head)

    def window(full: Any, given: Any) -> Any:
        (_, sums, carry), ((states, known), xs_w) = full, given
        before = program.by_id(states)
        states, sums, *out = program.scan(states, sums, xs_w, fold_of(carry), **known)
        carry, kept = after_window(carry, *out, before)
        return (states, sums, carry), kept

    full, outputs = (states, sums, carry), []
    if rest is not None:
        after, last = ahead(states, rest) if record else (None, (states, {}))
        (states, *others), out = window(full, (last, rest))
        full = after if record else states, *others
        outputs.append(jax.tree.map(lambda a: a[None], out))
    states = full[0]
    if _changes(window, full, (given, head)):       # what arrives at the last window is zero
        first = jax.tree.map(lambda a: a[0], (given, head))
        (_, _, arriving), _ = jax.eval_shape(window, full, first)
        full = (*full[:2], jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), arriving))
    (_, sums, carry), out = jax.lax.scan(window, full, (given, head), reverse=True)
    return states, carry, sums, _joined([out, *outputs])


def _cut(xs: Any, K: int) -> tuple[Any, Any]:
    """Whole windows, ``[windows, K, ...]``, and the shorter last one or ``None``."""
    whole, rest = divmod(_length(xs), K)
    head = jax.tree.map(lambda a: a[:whole * K].reshape(whole, K, *a.shape[1:]), xs)
    return head, jax.tree.map(lambda a: a[whole * K:], xs) if rest else None


def _length(xs: Any) -> int:
    return int(jax.tree.leaves(xs)[0].shape[0])


def _joined(outputs: list[Any]) -> Any:
    """Outputs of windows, ``[windows, K, ...]`` each, as one sequence."""
    flat = [jax.tree.map(
        lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), out) for out in outputs]
    return flat[0] if len(flat) == 1 else jax.tree.map(
        lambda *parts: jnp.concatenate(parts), *flat)


def _changes(window: Any, full: Any, given: Any) -> bool:
    """Whether a window changes the structure of the carry (which may start empty)."""
    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), given)
    out, _ = jax.eval_shape(window, full, first)
    return bool(jax.tree.structure(out) != jax.tree.structure(full))
