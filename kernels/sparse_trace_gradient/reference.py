# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The gradient of a sparse weight over a window: the definition of the operation, in plain JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

__all__ = ['sparse_trace_gradient']


def sparse_trace_gradient(inputs: Any, delta: Any, sources: Any, targets: Any,
                          by_sample: bool = False) -> Any:
    r""":math:`g_k = \sum_t \sum_b x[i_k]\,\delta[o_k]`, a product sampled at the synapses.

    A step at a time: of all steps at once, XLA would store two arrays ``[T, B, K]``.

    Parameters
    ----------
    inputs : array, ``[*lanes, T, B, I]``
        :math:`x`.
    delta : array, ``[*lanes, T, B, O]``
        :math:`\delta`.
    sources, targets : int32 arrays, ``[K]``
        :math:`i_k`, ascending, and :math:`o_k` of every synapse.
    by_sample : bool
        Sum over steps alone: ``[*lanes, B, K]``.
    """
    def step(total: Any, now: Any) -> Any:
        x, d = (a.at[..., where].get(mode='promise_in_bounds', wrap_negative_indices=False)
                for a, where in zip(now, (sources, targets), strict=True))
        return total + x * d, None

    steps = jnp.moveaxis(inputs, -3, 0), jnp.moveaxis(delta, -3, 0)
    # a sample's zeros, of its own axes and devices
    start = jnp.zeros_like(steps[0][0][..., :1]) * jnp.zeros_like(sources, delta.dtype)
    total = lax.scan(step, start, steps)[0]
    return total if by_sample else total.sum(-2)
