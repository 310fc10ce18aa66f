# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The weight gradient of a window: the op's own weight VJP, once, over all steps and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from traceops.window.jaxprs import depends_on

__all__ = ['input_dependent', 'weight_vjp']

Operation = Callable[[Any, dict[str, Any]], Any]


def weight_vjp(op: Operation, weights: dict[str, Any], x: Any, x_rank: int,
               cotangent: Any, y_shape: Sequence[int], precision: str) -> dict[str, Any]:
    r"""``sum_t vjp_W(op)(x_t, cotangent_t)`` in one call.

    The weight is not mapped, so the sum over steps (and lanes) is the contraction of the
    weight VJP itself: for a dense op one matrix product with inner dimension ``T * B``.

    Parameters
    ----------
    op : callable
        ``(x, weights) -> y`` of one step.
    weights : dict of str to array
        The trainable operands.
    x : array or None
        ``[T, (lanes,) *x_shape]``; ``None`` for an op without input.
    x_rank : int
        Rank of one step's input.
    cotangent : array
        ``[T, ...]``, as many elements a step as ``y`` has (more, for an op without input whose
        output is broadcast over the batch).
    y_shape : sequence of int
        Shape of one step's output.
    precision : {'highest', 'high', 'default'}
        Of the products.
    """
    if x is None:
        def everything(w: dict[str, Any]) -> Any:
            return jnp.broadcast_to(op(None, w), cotangent.shape)
    else:
        lead = x.ndim - x_rank
        cotangent = cotangent.reshape((*x.shape[:lead], *y_shape))

        def everything(w: dict[str, Any]) -> Any:
            step: Callable[[Any], Any] = lambda one: op(one, w)  # noqa: E731
            for _ in range(lead):
                step = jax.vmap(step)
            return step(x)

    with jax.default_matmul_precision(precision):
        out, vjp = jax.vjp(everything, weights)
        return vjp(cotangent.astype(out.dtype))[0]


def input_dependent(op: Operation, weights: dict[str, Any], x: Any,
                    y_shape: Sequence[int]) -> dict[str, bool]:
    """Which operands' gradients read the input: a weight's does, a bias's does not.

    ES-D-RTRL filters the input, so only these gradients carry the filter.
    """
    def pull(x_: Any, ct: Any, w: dict[str, Any]) -> Any:
        out, vjp = jax.vjp(lambda w_: op(x_, w_), w)
        return vjp(ct.astype(out.dtype))[0]

    ct = jax.ShapeDtypeStruct(tuple(y_shape), jnp.result_type(float))
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights)
    closed, shape = jax.make_jaxpr(pull, return_shape=True)(x, ct, structs)
    keys = list(jax.tree.unflatten(jax.tree.structure(shape), range(len(jax.tree.leaves(shape)))
                                   ).items())
    return {key: depends_on(closed, position, (0,)) for key, position in keys}
