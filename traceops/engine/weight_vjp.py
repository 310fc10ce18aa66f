# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The weight gradient of a window: the op's own weight VJP, once, over all steps and samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from traceops.compiler.jaxpr import backward_slice, depends_on, inlined, part
from traceops.ops import trace_gradient

__all__ = ['input_dependent', 'weight_vjp']

Operation = Callable[[Any, dict[str, Any]], Any]


def weight_vjp(op: Operation, weights: dict[str, Any], x: Any, x_rank: int,
               cotangent: Any, y_shape: Sequence[int], precision: str,
               backend: str | None = None, events: bool = False) -> dict[str, Any]:
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
        ``[T, ...]``, with as many elements a step as ``y`` (more, for an op without input whose
        output is broadcast over the batch).
    y_shape : sequence of int
        Shape of one step's output.
    precision : str
        Of the product, as :func:`traceops.ops.trace_gradient` takes it.
    backend : str, optional
        Of the product, as :func:`traceops.ops.trace_gradient` takes it.
    events : bool
        As :func:`traceops.ops.trace_gradient` takes it.
    """
    product = functools.partial(trace_gradient, precision=precision, backend=backend,
                                events=events)
    with jax.default_matmul_precision(_MATMUL[precision]):
        if x is None:
            return _pull(lambda w: jnp.broadcast_to(op(None, w), cotangent.shape), weights,
                         cotangent)
        lead, inner = x.shape[:x.ndim - x_rank], x.shape[x.ndim - x_rank:]

        on_rows = _on_rows(op, weights, x, x_rank, y_shape)
        if on_rows is not None:
            found = _product(on_rows, weights, x.reshape(x.shape[0], -1, inner[-1]),
                             cotangent.reshape(x.shape[0], -1, y_shape[-1]), product,
                             alone=x_rank == 2)
            if found is not None:
                return found

        # lanes before steps: those that are spread over devices stay where they are
        x, cotangent = (jnp.moveaxis(a, 0, len(lead) - 1).reshape(-1, *shape) for a, shape in (
            (x, inner), (cotangent.reshape(*lead, *y_shape), tuple(y_shape))))
        return _pull(lambda w: jax.vmap(lambda one: op(one, w))(x), weights, cotangent)


#: jax's nearest precision, for operations that are not a plain product.
_MATMUL = {'highest': 'highest', 'bf16x3': 'high', 'bf16x2': 'high', 'tf32': 'tensorfloat32'}


def _pull(function: Callable[..., Any], weights: dict[str, Any], cotangent: Any) -> dict[str, Any]:
    out, vjp = jax.vjp(function, weights)
    return vjp(cotangent.astype(out.dtype))[0]


def _product(op: Operation, weights: dict[str, Any], x: Any, cotangent: Any,
             product: Callable[..., Any], alone: bool) -> dict[str, Any] | None:
    """The weight VJP of an op on rows, ``[T, B, ...]``, with its product as ``product``.

    The VJP of a dense op multiplies the inputs with the cotangents over all rows; the rest of it
    (a bias, a transformed weight) stays as it is. Without such a product the result is the VJP
    over all rows if ``alone``, else ``None``.
    """
    def pull(x: Any, cotangent: Any, weights: dict[str, Any]) -> dict[str, Any]:
        return _pull(lambda w: op(x, w), weights, cotangent)

    # samples before steps: they stay spread over the devices that they are spread over
    flat = [jnp.swapaxes(a, 0, 1).reshape(-1, a.shape[-1]) for a in (x, cotangent)]
    traced, shape = jax.make_jaxpr(pull, return_shape=True)(*flat, weights)
    closed = inlined(traced)
    jaxpr = closed.jaxpr
    x_var, ct_var = jaxpr.invars[:2]
    products = [e for e in jaxpr.eqns if e.primitive.name == 'dot_general'
                and set(e.invars) == {x_var, ct_var}
                and e.params['dimension_numbers'] == (((0,), (0,)), ((), ()))]
    if not (products or alone):
        return None
    values = [product(x, cotangent) for _ in products]
    values = [a if e.invars[0] is x_var else a.T for e, a in zip(products, values, strict=True)]
    made = [e.outvars[0] for e in products]
    eqns, _ = backward_slice(jaxpr, jaxpr.outvars, given=set(made))
    out = part(closed, [*jaxpr.invars, *made], jaxpr.outvars, eqns)(
        *flat, *jax.tree.leaves(weights), *values)
    return jax.tree.unflatten(jax.tree.structure(shape), out)


def _on_rows(op: Operation, weights: dict[str, Any], x: Any, x_rank: int,
             y_shape: Sequence[int]) -> Operation | None:
    """The op on any number of rows, if it maps matrices to matrices row by row.

    Under ``vmap`` a step has one row: the op is then mapped over rows.
    """
    if x_rank not in (1, 2) or len(y_shape) != x_rank or not jnp.issubdtype(x.dtype, jnp.inexact):
        return None
    if x_rank == 1:
        return jax.vmap(op, in_axes=(0, None))
    if x.shape[-2] != y_shape[0]:
        return None
    rows = math.prod(x.shape[:-1])
    try:
        out = jax.eval_shape(op, jax.ShapeDtypeStruct((rows, x.shape[-1]), x.dtype), weights)
    except (TypeError, ValueError):     # an op made for this number of rows
        return None
    return op if tuple(out.shape) == (rows, y_shape[1]) else None


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
