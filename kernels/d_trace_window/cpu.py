# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""One pass over the D-RTRL trace as a CPU is quickest with it; in plain JAX."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.kernels.d_trace_window.reference import d_trace_window as _definition

__all__ = ['d_trace_window']

#: Bytes of one sample's trace from which the samples are taken one by one: it then stays in cache
#: for everything that is done with it.
_LARGE = 2 ** 16


def d_trace_window(trace: Any, inputs: Any, factor: Any, transition: Any, signal: Any,
                   gradient: str) -> tuple[Any, Any]:
    """As the definition."""
    operands = trace, inputs, factor, transition, signal
    size = math.prod(trace.shape[1:]) * np.dtype(trace.dtype).itemsize
    if trace.shape[0] < 2 or size < _LARGE:
        return _definition(*operands, gradient)

    def one(total: Any, sample: Any) -> Any:
        e, x, p, M, L = sample
        new, more = _definition(e[None], x[:, None], p.reshape(-1, 1, *signal.shape[1:]),
                                M.reshape(1, *transition.shape[1:]), L[None], gradient)
        return total + more, new[0]

    # outputs and states as one axis: around an axis of size one XLA transposes in two copies
    T, B = inputs.shape[:2]
    samples = (trace, jnp.moveaxis(inputs, 1, 0), jnp.moveaxis(factor.reshape(T, B, -1), 1, 0),
               transition.reshape(B, -1), signal)
    # an empty sum: zeros that are placed on devices as the operands are
    start = (signal[:0, None, :, 0] * trace[:0, ..., 0].astype(factor.dtype)).sum(0)
    total, new = jax.lax.scan(one, start, samples)
    return new, total
