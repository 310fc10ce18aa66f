# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The weight gradient of a window: the definition of the operation, in plain JAX."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

__all__ = ['PRECISIONS', 'split_bf16', 'trace_gradient']

#: What ``precision`` may be.
PRECISIONS = ('highest', 'bf16x3', 'bf16x2', 'tf32')


def split_bf16(values: Any, terms: int) -> tuple[Any, ...]:
    """bfloat16 arrays whose sum is ``values`` to 8 bits a term."""
    out = []
    for _ in range(terms):
        # XLA may drop a conversion there and back as "excess precision"; this it keeps.
        out.append(lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7))
        values = values - out[-1]
    return tuple(a.astype(jnp.bfloat16) for a in out)


def trace_gradient(inputs: Any, delta: Any, total: Any = None, precision: str = 'highest',
                   by_sample: bool = False) -> Any:
    r""":math:`dW = dW_0 + \sum_t \sum_b x \otimes \delta`, one matrix product.

    Parameters
    ----------
    inputs : array, ``[*lanes, T, B, I]``
        :math:`x`.
    delta : array, ``[*lanes, T, B, O]``
        :math:`\delta`.
    total : array, ``[*lanes, I, O]``, optional
        :math:`dW_0`.
    precision : {'highest', 'bf16x3', 'bf16x2', 'tf32'}
        ``bf16xN``: x in bfloat16 (exact for spikes), delta as the sum of N bfloat16 terms.
        ``tf32``: both rounded to 10 bits, by the tensor cores where there are some.
    by_sample : bool
        Sum over steps alone: ``[*lanes, B, I, O]``, and so is ``total``.
    """
    product = _at_precision(inputs, delta, precision, by_sample).astype(delta.dtype)
    return product if total is None else total + product


def _at_precision(inputs: Any, delta: Any, precision: str, by_sample: bool) -> Any:
    product = functools.partial(_product, by_sample=by_sample)
    if precision in ('bf16x3', 'bf16x2') and inputs.dtype == jnp.float32:
        x = inputs.astype(jnp.bfloat16)
        terms = [product(x, d, None) for d in split_bf16(delta, int(precision[-1]))]
        return sum(terms[::-1])
    if precision == 'tf32' and inputs.dtype == jnp.float32:
        return lax.platform_dependent(
            inputs, delta, default=functools.partial(_rounded, product),
            cuda=functools.partial(product, precision=lax.DotAlgorithmPreset.TF32_TF32_F32))
    return product(inputs, delta, lax.Precision.HIGHEST)


def _rounded(product: Any, x: Any, d: Any) -> Any:
    x, d = (lax.reduce_precision(a, exponent_bits=8, mantissa_bits=10) for a in (x, d))
    return product(x, d, lax.Precision.HIGHEST)


def _product(x: Any, d: Any, precision: Any, by_sample: bool) -> Any:
    lanes, steps, samples = tuple(range(x.ndim - 3)), x.ndim - 3, x.ndim - 2
    lanes, summed = ((*lanes, samples), (steps,)) if by_sample else (lanes, (steps, samples))
    wide = jnp.float32 if d.dtype == jnp.bfloat16 else d.dtype
    return lax.dot_general(x, d, ((summed, summed), (lanes, lanes)), precision=precision,
                           preferred_element_type=wide)
