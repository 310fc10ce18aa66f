# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The ES-D-RTRL factors over a window: the definition of the operation, in plain JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from traceops.kernels.layout import split, split_rows, time_varying

__all__ = ['es_trace_step', 'es_trace_window', 'instant_gradient', 'output_filter']

States = Sequence[Any]


def es_trace_step(jacobian: Sequence[States], factor: States, carry: States,
                  decay_f: float) -> tuple[Any, ...]:
    r"""One step of the output-side factor.

    Parameters
    ----------
    jacobian : S sequences of S arrays, ``[...]``
        :math:`D_t`, row by row.
    factor, carry : sequence of S arrays, ``[...]``
        :math:`f_t` and :math:`g_{t-1}`.
    decay_f : float
        :math:`\alpha_f`.

    Returns
    -------
    tuple of S arrays
        :math:`g_t = \alpha_f D_t g_{t-1} + (1 - \alpha_f) f_t`.
    """
    states = range(len(carry))
    return tuple(decay_f * sum(jacobian[i][j] * carry[j] for j in states)
                 + (1 - decay_f) * factor[i] for i in states)


def instant_gradient(signal: States, carry: States, correction: Any) -> Any:
    r""":math:`(g_t \cdot L_t) / c_t` of one step, or of many: ``[T, ...]``, corrections ``[T]``."""
    c = jnp.asarray(correction).astype(carry[0].dtype)
    c = c.reshape(*c.shape, *(1,) * (carry[0].ndim - c.ndim))
    return sum(a * (b / c) for a, b in zip(signal, carry, strict=True))


def output_filter(instant: Any, decay: float) -> Any:
    r"""Reverse scan :math:`r_t = \mathrm{instant}_t + \alpha_x r_{t+1}`, ``[T, ...]``.

    The low-pass of the input, moved to the output side: the operand of the weight gradient
    stays the raw input (0/1 for spikes).
    """
    def back(carry: Any, now: Any) -> Any:
        carry = now + decay * carry
        return carry, carry

    return jax.lax.scan(back, instant[:0].sum(0), instant, reverse=True)[1]


def es_trace_window(signal: States, jacobian: Sequence[States], factor: States, carry: States,
                    correction: Any, decay_x: float, decay_f: float,
                    ) -> tuple[Any, Any, tuple[Any, ...]]:
    r"""Forward scan of the factor, product with the signal, reverse filter of the product.

    Parameters
    ----------
    signal, factor : sequence of S arrays, ``[T, ...]``, or one array ``[T, ..., S]``
        :math:`L_t` and :math:`f_t`.
    jacobian : S sequences of S arrays, ``[T, ...]``, or one array ``[T, ..., S, S]``
        :math:`D_t`, row by row. Separate arrays may be ``[1, ...]``, the same at every step, here
        and in ``signal`` and ``factor``.
    carry : sequence of S arrays, ``[...]``, or one array ``[..., S]``
        :math:`g_0`.
    correction : array, ``[T]``
        The warm-up correction :math:`c_t`.
    decay_x, decay_f : float
        :math:`\alpha_x` and :math:`\alpha_f`.

    Returns
    -------
    filtered : array, ``[T, ...]``
        :math:`r_t = (g_t \cdot L_t)/c_t + \alpha_x r_{t+1}`.
    total : array, ``[...]``
        :math:`\sum_t (g_t \cdot L_t)/c_t`.
    carry : tuple of S arrays, ``[...]``
        :math:`g_T`.
    """
    slices, step_of = time_varying((signal, jacobian, factor, correction))

    def step(g: Any, now: Any) -> Any:
        L, D, f, c = step_of(now)
        g = es_trace_step(split_rows(D), split(f), g, decay_f)
        return g, instant_gradient(split(L), g, c)

    if correction.shape[0] == 1:                # the update of one step: no loop
        leaving, instant = step(split(carry), [a[0] for a in slices])
        return instant[None], instant, leaving
    leaving, instant = jax.lax.scan(step, split(carry), slices)
    return output_filter(instant, decay_x), instant.sum(0), leaving
