# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The ES-D-RTRL factors over a window: the definition of the operation, in plain JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ['es_trace_window', 'output_filter', 'smoothing_step']

States = Sequence[Any]


def smoothing_step(carry: States, jacobian: Sequence[States], factor: States,
                   decay: float) -> tuple[Any, ...]:
    r""":math:`g_t = \alpha_f D_t g_{t-1} + (1 - \alpha_f) f_t` for one step."""
    states = range(len(carry))
    return tuple(decay * sum(jacobian[i][j] * carry[j] for j in states)
                 + (1 - decay) * factor[i] for i in states)


def output_filter(instant: Any, decay: float) -> Any:
    r"""Reverse scan :math:`r_t = \mathrm{instant}_t + \alpha_x r_{t+1}`, ``[T, ...]``.

    The low-pass of the input, moved to the output side: the operand of the weight gradient
    stays the raw input (0/1 for spikes).
    """
    def back(carry: Any, now: Any) -> Any:
        carry = now + decay * carry
        return carry, carry

    return jax.lax.scan(back, jnp.zeros_like(instant[0]), instant, reverse=True)[1]


def es_trace_window(
    signal: States,
    jacobian: Sequence[States],
    factor: States,
    carry: States,
    correction: Any,
    decay_f: float,
) -> tuple[Any, tuple[Any, ...]]:
    r"""Forward scan of the output-side factor and its product with the learning signal.

    Parameters
    ----------
    signal, factor : sequence of S arrays, ``[T, ...]``
        :math:`L_t` and :math:`f_t`.
    jacobian : S sequences of S arrays, ``[T, ...]``
        :math:`D_t`, row by row.
    carry : sequence of S arrays, ``[...]``
        :math:`g_0`.
    correction : array, ``[T]``
        The warm-up correction :math:`c_t`.
    decay_f : float
        :math:`\alpha_f`.

    Returns
    -------
    instant : array, ``[T, ...]``
        :math:`(g_t \cdot L_t) / c_t`.
    carry : tuple of S arrays
        :math:`g_T`.
    """
    def forth(g: Any, step: Any) -> Any:
        D, f, L, c = step
        g = smoothing_step(g, D, f, decay_f)
        return g, sum(a * (b / c) for a, b in zip(L, g, strict=True))

    carry, instant = jax.lax.scan(
        forth, tuple(carry), (jacobian, tuple(factor), tuple(signal), correction))
    return instant, carry
