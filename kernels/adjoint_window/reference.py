# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The adjoint scan of a window: the definition of the operation, in plain JAX.

States are computed on as separate arrays rather than as a trailing axis of size ``S``: an
innermost axis of two or three elements defeats the vectoriser of a CPU. Operands with a trailing
axis are split inside the scan, while a step is in cache (split before it, S = 2 takes five times
as long).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from traceops.kernels.layout import split, split_rows, steps_of, time_varying

__all__ = ['adjoint_step', 'adjoint_window', 'leaving_window', 'transposed_matvec']

States = Sequence[Any]          # S arrays
Jacobian = Sequence[States]     # rows of S arrays: [i][j] = d h_i(t) / d h_j(t-1)


def transposed_matvec(jacobian: Jacobian, vector: States) -> tuple[Any, ...]:
    """``D^T v`` for one step: ``S`` arrays."""
    states = range(len(vector))
    return tuple(sum(jacobian[i][j] * vector[i] for i in states) for j in states)


def adjoint_step(signal: States, jacobian: Jacobian, factors: Sequence[States],
                 arriving: States, decaying: tuple[Any, ...] | None = None,
                 kappa: float | None = None,
                 ) -> tuple[tuple[Any, ...], tuple[Any, ...] | None, tuple[Any, ...]]:
    r"""One step back: :math:`\lambda_t = L_t + \mathrm{arriving}`.

    Parameters
    ----------
    signal, jacobian, factors, kappa
        As in :func:`adjoint_window`, of one step, ``[...]``, as S separate arrays.
    arriving : sequence of S arrays
        :math:`D_{t+1}^\top \lambda_{t+1}`.
    decaying : sequence of S arrays
        :math:`\kappa \tilde L_{t+1}`; with ``kappa`` only.

    Returns
    -------
    arriving, decaying : tuple of S arrays
        Of the step before.
    deltas : tuple of arrays
        :math:`\lambda_t \cdot f_t`, one per relation.
    """
    if kappa is not None and decaying is not None:
        signal = tuple(a + b for a, b in zip(signal, decaying, strict=True))
        decaying = tuple(kappa * a for a in signal)
    adjoint = tuple(a + b for a, b in zip(signal, arriving, strict=True))
    deltas = tuple(sum(a * b for a, b in zip(adjoint, f, strict=True)) for f in factors)
    return transposed_matvec(jacobian, adjoint), decaying, deltas


def adjoint_window(
    signal: States,
    jacobian: Jacobian,
    factors: Sequence[States],
    kappa: float | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...] | None]:
    r"""Reverse scan :math:`\lambda_t = L_t + D_{t+1}^\top \lambda_{t+1}`.

    And its product with the factors, :math:`\delta_t = \lambda_t \cdot f_t`.

    Parameters
    ----------
    signal : sequence of S arrays, ``[T, ...]``, or one array ``[T, ..., S]``
        Learning signal :math:`L_t = \partial \mathrm{loss}_t / \partial h_t`.
    jacobian : S sequences of S arrays, ``[T, ...]``, or one array ``[T, ..., S, S]``
        :math:`D_t = \partial h_t / \partial h_{t-1}`, row by row. Any of these arrays may be
        ``[1, ...]``, the same at every step, but not all.
    factors : sequence (one entry per relation) of what ``signal`` is
        :math:`f_t = \partial h_t / \partial y_t` of every relation that feeds the group.
    kappa : float, optional
        Low-pass of the trace (e-prop): the signal becomes
        :math:`\tilde L_t = L_t + \kappa \tilde L_{t+1}` before the scan.

    Returns
    -------
    deltas : tuple of arrays, ``[T, ...]``
        One per relation.
    entering : tuple of S arrays
        :math:`D_1^\top \lambda_1`, the signal that pairs with a trace entering the window.
    filtered : tuple of S arrays or None
        :math:`\kappa \tilde L_1`, which pairs with a filtered trace entering the window.
    """
    # an empty sum: zeros that are placed on devices as the signal is
    zeros = split(jax.tree.map(lambda s: s[:0].sum(0), signal))
    slices, step_of = time_varying((signal, jacobian, factors))

    def back(carry: Any, now: Any) -> Any:
        L, D, f = step_of(now)
        arriving, decaying, deltas = adjoint_step(
            split(L), split_rows(D), [split(a) for a in f], carry[0], carry[1], kappa)
        return (arriving, decaying), deltas

    carry = (zeros, zeros if kappa is not None else None)
    (entering, filtered), deltas = jax.lax.scan(back, carry, slices, reverse=True)
    return deltas, entering, filtered


def leaving_window(jacobian: Jacobian, factors: Sequence[States],
                   kappa: float | None = None,
                   ) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    r"""The same scan for every state after the window: the parts of the trace that leaves.

    Row i is the adjoint scan of a unit signal on state i after the last step.

    Parameters
    ----------
    jacobian, factors, kappa
        As in :func:`adjoint_window`.

    Returns
    -------
    products : tuple of arrays, ``[T, ..., S]``
        :math:`p_s = D_T \cdots D_{s+1} f_s` of every relation.
    totals : tuple of arrays, ``[..., S]``
        :math:`\sum_s p_s`, the trace of a bias.
    transition : array, ``[..., S, S]``
        :math:`M = D_T \cdots D_1`.
    """
    first = jacobian[0][0] if isinstance(jacobian, Sequence) else jacobian[..., 0, 0]
    states = range(len(jacobian) if isinstance(jacobian, Sequence) else jacobian.shape[-1])
    zero = jnp.zeros((steps_of((jacobian, factors)), *first.shape[1:]), first.dtype)
    one = zero.at[-1].set(1.)
    rows = [adjoint_window([one if j == i else zero for j in states], jacobian, factors, kappa)
            for i in states]
    products = tuple(jnp.stack([deltas[r] for deltas, _, _ in rows], -1)
                     for r in range(len(factors)))
    totals = tuple(p.sum(0) for p in products)
    return products, totals, jnp.stack([jnp.stack(entering, -1) for _, entering, _ in rows], -2)
