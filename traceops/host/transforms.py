# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What an op makes of its weights before it uses them (``weight_fn``, ``bias_fn``; of LoRA
``b_fn``, ``a_fn``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.compiler.jaxpr import elementwise, inlined

__all__ = ['is_elementwise', 'is_transformed', 'mixed', 'pulled_back', 'slope', 'used']


def _function(relation: Any, key: str) -> Any:
    return relation.eqn_params.get(f"{key.removeprefix('lora_')}_fn")


def is_transformed(relation: Any) -> bool:
    """Whether the op of a relation transforms any of its weights."""
    return any(_function(relation, key) is not None for key in relation.trainable_vars)


def is_elementwise(relation: Any) -> bool:
    """Whether a change of a weight changes, of what the op uses, only what stands in its place.

    Then the transform is a factor of its own for each weight, which stays the same however the
    hidden states propagate the trace.
    """
    return all(_is_elementwise(_function(relation, key), var.aval)
               for key, var in relation.trainable_vars.items()
               if _function(relation, key) is not None)


def _is_elementwise(function: Any, aval: Any) -> bool:
    weight = jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    def pull(weight: Any, cotangent: Any) -> Any:
        return jax.vjp(function, weight)[1](cotangent)[0]

    try:
        out = jax.eval_shape(function, weight)
        if not isinstance(out, jax.ShapeDtypeStruct) or out.shape != weight.shape:
            return False
        return elementwise(inlined(jax.make_jaxpr(pull)(weight, out)), 0, 1)
    except Exception:       # e.g. it reads a value of a jitted function that is over: stepped then
        return False


def used(relation: Any, weights: dict[str, Any], key: str) -> Any:
    """A weight as the op uses it."""
    function = _function(relation, key)
    return weights[key] if function is None else function(weights[key])


def mixed(relation: Any, outputs_of: Callable[[str], Any]) -> list[str]:
    """The operands whose transform mixes weights of different outputs of the op, or may.

    Then the trace of a weight follows its own output alone upstream, and not what its weight does
    to the others. Found by trial: gradients at some of the outputs, and where they arrive.

    Parameters
    ----------
    relation : relation
    outputs_of : callable
        Name of an operand -> the output of each of its elements, or ``None`` if that is not known.
    """
    return [key for key, var in relation.trainable_vars.items()
            if (function := _function(relation, key)) is not None
            and not _is_elementwise(function, var.aval)
            and _mixes(function, var.aval, outputs_of(key))]


def _mixes(function: Any, aval: Any, outputs: Any) -> bool:
    if outputs is None:
        return True
    rng = np.random.default_rng(0)
    weight, at = (rng.uniform(0.1, 0.9, aval.shape).astype(aval.dtype) for _ in range(2))

    def pull(weight: Any, cotangent: Any) -> Any:
        return jax.vjp(function, weight)[1](cotangent)[0]

    try:
        closed = jax.make_jaxpr(pull)(weight, at)
        # an array of the program around this one has no values: any will do
        consts = [rng.uniform(0.1, 0.9, a.shape).astype(a.dtype)
                  if isinstance(a, jax.core.Tracer) else a for a in closed.consts]
        for bit in range(int(outputs.max(initial=0)).bit_length()):     # any two differ in one
            for one in (0, 1):
                some = outputs >> bit & 1 == one
                with jax.ensure_compile_time_eval():
                    (found,) = jax.core.eval_jaxpr(
                        closed.jaxpr, consts, weight, np.where(some, at, 0))
                if (np.asarray(found)[~some] != 0).any():
                    return True
        return False
    except Exception:       # a shape of its own, a value of a jitted function that is over
        return True


def pulled_back(relation: Any, weights: dict[str, Any], key: str, cotangent: Any) -> Any:
    """A gradient of what the op uses, as one of the weight itself."""
    function = _function(relation, key)
    if function is None:
        return cotangent
    out, vjp = jax.vjp(function, weights[key])
    return vjp(cotangent.astype(out.dtype))[0]


def slope(relation: Any, weights: dict[str, Any], key: str) -> Any:
    """The derivative of an elementwise transform, in the shape of the weight; 1 for none."""
    function = _function(relation, key)
    if function is None:
        return jnp.ones((), weights[key].dtype)
    out, vjp = jax.vjp(function, weights[key])
    return vjp(jnp.ones_like(out))[0]
