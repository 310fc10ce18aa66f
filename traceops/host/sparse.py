# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse weights: what their synapses connect, and the gradient of a window at them."""

from __future__ import annotations

import dataclasses
from typing import Any

import brainevent
import jax
import jax.numpy as jnp
import numpy as np

from traceops.host import upstream
from traceops.host.transforms import pulled_back
from traceops.ops import sparse_trace_gradient

__all__ = ['Synapses', 'has_synapses', 'sparse_gradient', 'targets_of']


#: Class of pattern: the axis by whose neurons synapses are stored, and whether it is the sources'.
_KNOWN = {brainevent.CSR: (0, True), brainevent.CSC: (1, False),
          brainevent.FixedNumPerPre: (0, True), brainevent.FixedNumPerPost: (1, False)}
if 'TCSR' in vars(brainevent):      # since 0.3; a transposed one is stored by its own rows too
    _KNOWN[brainevent.TCSR] = 0, True


def has_synapses(relation: Any) -> bool:
    """Whether an op is a sparse one whose pattern can be read (one of a known class)."""
    return _stored(upstream.sparse_matrix(relation)) is not None


def _stored(matrix: Any) -> tuple[Any, int, bool] | None:
    """Of a known class: indices of the synapses as they are stored, and what they belong to.

    The latter is how many neurons there are, and whether these are the sources.
    """
    found = _KNOWN.get(type(matrix))
    if found is None or isinstance(matrix.indices, jax.core.Tracer):
        return None
    axis, of_sources = found
    return matrix.indices, matrix.shape[axis], of_sources


def _ends(matrix: Any) -> tuple[Any, Any, bool]:
    """Sources and targets of the synapses as they are stored, and whether sources are in order."""
    stored = _stored(matrix)
    assert stored is not None
    indices, count, of_sources = stored
    other = np.asarray(indices).reshape(-1).astype(np.int32)
    lengths = np.diff(np.asarray(matrix.indptr)) if hasattr(matrix, 'indptr') else (
        other.size // max(count, 1))
    own: Any = np.repeat(np.arange(count, dtype=np.int32), lengths)
    return (own, other, True) if of_sources else (other, own, False)


def targets_of(relation: Any) -> Any:
    """The output of every synapse of a sparse op, as its weights are stored: int32 ``[K]``."""
    return _ends(upstream.sparse_matrix(relation))[1]


@dataclasses.dataclass(frozen=True)
class Synapses:
    """What every weight of a sparse op connects.

    Attributes
    ----------
    inputs, outputs : int
        Neurons on either side.
    sources, targets : int32 arrays, ``[K]``
        In the order of the sources.
    ends : int32 array, ``[K]``
        The targets as the weights are stored.
    places : int32 array, ``[K]``, or None
        Where each weight is among the sources; ``None`` where it is stored there.
    """

    inputs: int
    outputs: int
    sources: Any
    targets: Any
    ends: Any
    places: Any

    @classmethod
    def of(cls, relation: Any) -> Synapses:
        """Those of a sparse op (see :func:`has_synapses`).

        They are computed here, not in the program: XLA takes seconds to fold what is computed of
        large constants.
        """
        matrix = upstream.sparse_matrix(relation)
        sources, targets, in_order = _ends(matrix)
        order = None if in_order else np.argsort(sources, kind='stable')
        places = None
        if order is not None:
            places = np.empty(order.size, np.int32)
            places[order] = np.arange(order.size, dtype=np.int32)
        ordered = (sources, targets) if order is None else (sources[order], targets[order])
        # what the barrier hides is no constant that XLA would compute with
        hidden = [None if a is None else jax.lax.optimization_barrier(jnp.asarray(a))
                  for a in (*ordered, targets, places)]
        return cls(*matrix.shape, *hidden)

    def sampled(self, x: Any, cotangent: Any, backend: str | None,
                by_sample: bool = False, events: bool = False) -> Any:
        """``[K]``, of every weight as it is stored: ``[T, ..., inputs]`` and outputs."""
        steps = x.shape[0]
        found = sparse_trace_gradient(
            x.reshape(steps, -1, self.inputs).astype(cotangent.dtype),
            cotangent.reshape(steps, -1, self.outputs), self.sources, self.targets,
            by_sample=by_sample, events=events, backend=backend)
        return found if self.places is None else found[..., self.places]


def sparse_gradient(relation: Any, weights: dict[str, Any], x: Any, cotangent: Any,
                    backend: str | None, events: bool) -> dict[str, Any]:
    """``sum_t vjp_W(op)(x_t, cotangent_t)`` of a sparse op, ``[T, ...]`` each."""
    synapses = Synapses.of(relation)
    weight = synapses.sampled(x, cotangent, backend, events=events)
    if weights['weight'].size == 1:             # one weight for all synapses
        weight = weight.sum()
    found = {'weight': weight.reshape(weights['weight'].shape)}
    if 'bias' in weights:
        found['bias'] = cotangent.reshape(-1, synapses.outputs).sum(0).reshape(
            weights['bias'].shape)
    return {key: pulled_back(relation, weights, key, value) for key, value in found.items()}
