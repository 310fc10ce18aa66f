# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""One pass over the D-RTRL trace: the definition of the operation, in plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ['d_trace_start', 'd_trace_window']


def d_trace_window(trace: Any, inputs: Any, factor: Any, transition: Any, signal: Any,
                   gradient: str = 'entering') -> tuple[Any, Any]:
    r"""The trace after a window, and what a trace contributes to the weight gradient.

    Parameters
    ----------
    trace : array, ``[B, I, O, S]``
        :math:`e`; may be stored in a narrower dtype than the arithmetic.
    inputs : array, ``[T, B, I]``
        :math:`x_s`.
    factor : array, ``[T, B, O, S]``
        :math:`p_s = D_T \cdots D_{s+1} f_s`.
    transition : array, ``[B, O, S, S]``
        :math:`M = D_T \cdots D_1`.
    signal : array, ``[B, O, S]``
        What the trace is paired with.
    gradient : {'entering', 'leaving', 'none'}
        Pair the signal with :math:`e`, with :math:`e'`, or with nothing.

    Returns
    -------
    trace : array, ``[B, I, O, S]``
        :math:`e' = M e + \sum_s x_s \otimes p_s`.
    gradient : array, ``[I, O]``
        :math:`\sum_b \sum_s \mathrm{signal} \cdot e`, unrounded: :math:`e'` before it is stored.
    """
    wide = factor.dtype
    states = range(trace.shape[-1])
    e = tuple(trace[..., s].astype(wide) for s in states)
    new = tuple(
        sum(transition[:, None, :, s, r] * e[r] for r in states)
        + _outer(inputs, factor[..., s]) for s in states)
    paired = {'entering': e, 'leaving': new, 'none': ()}[gradient]
    pairs: Any = sum(signal[:, None, :, s] * a for s, a in enumerate(paired))
    total = jnp.sum(pairs, 0) if paired else jnp.zeros(trace.shape[1:3], wide)
    return jnp.stack(new, -1).astype(trace.dtype), total


def d_trace_start(inputs: Any, factor: Any) -> Any:
    r""":math:`\sum_s x_s \otimes p_s`, ``[B, I, O, S]``: what leaves where zero entered."""
    T, B, O, S = factor.shape
    return _outer(inputs, factor.reshape(T, B, O * S)).reshape(B, inputs.shape[2], O, S)


def _outer(inputs: Any, factor: Any) -> Any:
    if inputs.shape[0] == 1:            # no product to form: one fused pass over the trace
        return inputs[0, :, :, None] * factor[0, :, None, :]
    return jnp.einsum('tbi,tbo->bio', inputs, factor, precision=jax.lax.Precision.HIGHEST)
