# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""How long a window is, and the loop over windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from traceops.window.program import StepProgram

__all__ = ['bytes_of', 'choose_window', 'run_windows']


def choose_window(length: int, step_bytes: int, window: int | None, budget: int) -> int:
    """Steps per window: what was asked, else the longest whose record fits the budget.

    Of the lengths down to half the longest, one that divides the sequence is preferred: a
    shorter last window is a second program to compile.
    """
    if window is not None:
        return min(window, length)
    longest = max(1, min(length, budget // max(step_bytes, 1)))
    for K in range(longest, longest // 2, -1):
        if length % K == 0:
            return K
    return longest


def bytes_of(n: int) -> str:
    """A size as the settings take it, rounded up."""
    return f'{-(-n // 2 ** 20)}MiB'


def run_windows(program: StepProgram, xs: Any, K: int, carry: Any,
                after_window: Callable[[Any, Any, Any, dict[int, Any]], Any],
                inner_of: Callable[[Any], Any] = lambda carry: (),
                digest: Callable[..., Any] | None = None) -> tuple[Any, Any, Any]:
    """Simulate ``xs`` in windows of ``K`` steps; digest each record before the next.

    Parameters
    ----------
    program : StepProgram
        The recorded step; its states are read before and written after.
    xs : pytree of arrays, ``[T, ...]``
        What the step is called with.
    K : int
        Steps per window.
    carry : pytree
        What passes from window to window beside the states.
    after_window : callable
        ``(carry, inner, stacked outputs of the window, states before it) -> (carry, kept
        outputs)``.
    inner_of, digest : callable, optional
        What is folded step by step inside the window (see :meth:`StepProgram.scan`).

    Returns
    -------
    carry, sums, outputs
        ``sums`` are the outputs that add up over steps; ``outputs`` are concatenated over
        windows, ``[T, ...]``.
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    states, sums = program.initial()

    def window(full: Any, xs_w: Any) -> Any:
        states, sums, carry = full
        before = program.by_id(states)
        states, sums, inner, out = program.scan(states, sums, xs_w, inner_of(carry), digest)
        carry, kept = after_window(carry, inner, out, before)
        return (states, sums, carry), kept

    full = (states, sums, carry)
    whole, rest = divmod(length, K)
    outputs = []
    head = jax.tree.map(lambda a: a[:whole * K].reshape(whole, K, *a.shape[1:]), xs)
    if whole > 1 and _same_shape(window, full, head):
        full, out = jax.lax.scan(window, full, head)
        outputs.append(jax.tree.map(lambda a: a.reshape(whole * K, *a.shape[2:]), out))
    elif whole:
        full, out = window(full, jax.tree.map(lambda a: a[0], head))
        outputs.append(out)
        if whole > 1:
            later = jax.tree.map(lambda a: a[1:], head)
            full, out = jax.lax.scan(window, full, later)
            outputs.append(jax.tree.map(lambda a: a.reshape((whole - 1) * K, *a.shape[2:]), out))
    if rest:
        full, out = window(full, jax.tree.map(lambda a: a[whole * K:], xs))
        outputs.append(out)
    states, sums, carry = full
    program.store(states)
    stacked = outputs[0] if len(outputs) == 1 else jax.tree.map(
        lambda *parts: jnp.concatenate(parts), *outputs)
    return carry, sums, stacked


def _same_shape(window: Any, full: Any, head: Any) -> bool:
    """Whether the carry keeps its structure (a trace that starts as nothing does not)."""
    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), head)
    out, _ = jax.eval_shape(window, full, first)
    return jax.tree.structure(out) == jax.tree.structure(full)
