# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Products with sparse weights in the loop over time, a row of the result at a time (on a CPU).

brainevent's ``csrmm`` with the transposed weights (``x @ CSR``) adds to a row of the result for
each synapse, which takes longer than adding. With the synapses in the order of the rows that they
lead to, which is found once and outside the loop, jax's product of a sparse matrix sums row by row.
Each element is a sum of the same products in the same order, so spikes, which may depend on the
last bit, stay upstream's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental.sparse import BCSR

__all__ = ['VARYING', 'describe', 'prepared', 'takes']

#: The operand that differs from step to step.
VARYING = 3

#: Of sparse matrices on a CPU.
_DTYPES = (jnp.float32, jnp.float64)


def takes(operation: Any, operands: Sequence[Any], varies: Callable[[Any], bool],
          is_known: Callable[[Any], bool]) -> bool:
    """Whether a ``csrmm`` has loop-invariant weights, one a synapse, and a known pattern."""
    weights, *pattern, right = operands
    return (varies(right) and not varies(weights) and all(map(is_known, pattern))
            and weights.aval.shape == pattern[0].aval.shape
            and weights.aval.dtype == right.aval.dtype and weights.aval.dtype in _DTYPES)


def prepared(operation: Any, weights: Any, indices: Any, indptr: Any) -> Callable[[Any], Any]:
    """The operation as a function of ``[inputs, samples]``."""
    shape, transposed = operation.params['shape'], operation.params['transpose']

    def as_written(weights: Any, right: Any) -> Any:
        (out,) = operation.primitive.bind(weights, indices, indptr, right, **operation.params)
        return out

    pattern, ordered = (indices, indptr), weights
    if transposed:
        index = np.asarray(indices)
        by_row = scipy.sparse.csr_array(
            (np.arange(index.size, dtype=np.int32), index, np.asarray(indptr)), shape).tocsc()
        pattern = by_row.indices.astype(np.int32), by_row.indptr.astype(np.int32)
        # the barrier keeps the reordering out of the loop
        ordered, shape = jax.lax.optimization_barrier(weights[by_row.data]), shape[::-1]

    @jax.custom_batching.custom_vmap
    def of_rows(ordered: Any, weights: Any, right: Any) -> Any:
        return BCSR((ordered, *map(jnp.asarray, pattern)), shape=shape) @ right

    @of_rows.def_vmap
    def of_lanes(size: int, batched: Any, ordered: Any, weights: Any, right: Any) -> Any:
        if batched[0] or batched[1]:
            axes = 0 if batched[1] else None, 0 if batched[2] else None
            return jax.vmap(as_written, axes)(weights, right), True
        inputs, columns = right.shape[1:]           # lanes beside samples
        out = of_rows(ordered, weights, jnp.moveaxis(right, 0, 1).reshape(inputs, -1))
        return jnp.moveaxis(out.reshape(-1, size, columns), 1, 0), True

    differentiable = jax.custom_jvp(of_rows)
    differentiable.defjvp(lambda primals, tangents: jax.jvp(
        as_written, primals[1:], tangents[1:]))

    def product(right: Any) -> Any:
        # a sparse matrix is of no mesh, so not for the inside of shard_map
        if not jax.typeof(right).sharding.mesh.empty:
            return as_written(weights, right)
        return differentiable(ordered, weights, right)
    return product


def describe(count: int) -> list[str]:
    """What ``explain`` says where ``count`` products are taken so."""
    return [f'{count} product{"s" * (count > 1)} with sparse weights, a row of the result at a '
            'time'] if count else []
