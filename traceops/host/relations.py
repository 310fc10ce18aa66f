# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""braintrace's relations, seen as what the window engine needs of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.compiler.spikes import has_spikes
from traceops.engine.weight_vjp import input_dependent, weight_vjp
from traceops.host import upstream
from traceops.host.sparse import has_synapses, sparse_gradient, targets_of
from traceops.host.transforms import is_elementwise, is_transformed, mixed

__all__ = ['Keys', 'RelationView', 'event_weights', 'gradient_bytes', 'relation_views',
           'split_states', 'stack_rows', 'stack_states', 'weight_bytes']

#: Weights from which it is worth a look which spikes are zero.
_LARGE = 2 ** 18


def stack_states(arrays: Any) -> Any:
    """``S`` arrays to upstream's layout, a trailing axis of size ``S``."""
    return jnp.stack(arrays, axis=-1)


def stack_rows(rows: Any) -> Any:
    """``S x S`` arrays to upstream's layout, two trailing axes."""
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def split_states(array: Any) -> tuple[Any, ...]:
    """A trailing axis of size ``S`` to ``S`` arrays."""
    return tuple(array[..., i] for i in range(array.shape[-1]))


@dataclasses.dataclass(frozen=True)
class RelationView:
    """One ETP relation ``y = op(x, W)`` and the hidden groups it feeds."""

    relation: Any
    #: The first relation with this input, and the first with this output.
    x_place: int
    y_place: int
    #: One step of the model.
    model: Any = dataclasses.field(compare=False, repr=False)

    @property
    def is_dense(self) -> bool:
        """Whether the trace is that of a matrix: an input by an output."""
        relation = self.relation
        if not self.has_input or not set(relation.trainable_vars) <= {'weight', 'bias'} \
                or upstream.x_representation(relation) is not None:
            return False
        x_shape = relation.x_var.aval.shape
        return relation.trainable_vars['weight'].aval.shape == (*x_shape[-1:], *self.y_shape[-1:])

    @functools.cached_property
    def is_sparse(self) -> bool:
        """Whether the trace is that of the synapses of a sparse weight, one value each."""
        weight = self.relation.trainable_vars.get('weight')
        return (has_synapses(self.relation) and weight.aval.ndim == 1
                and weight.aval.size == upstream.sparse_matrix(self.relation).indices.size
                and is_elementwise(self.relation))

    @functools.cached_property
    def of_matrices(self) -> bool:
        """Whether the trace is that of a matrix whose weights are masked, made positive, ...; of
        one for each group; or of an embedding, whose input is one-hot.
        """
        relation = self.relation
        return is_elementwise(relation) and (upstream.is_other_matrix(relation) or (
            self.is_dense and upstream.is_matmul(relation) and is_transformed(relation)))

    @functools.cached_property
    def is_low_rank(self) -> bool:
        """Whether the trace is that of two matrices: the product of both, and the second."""
        return upstream.is_low_rank(self.relation) and is_elementwise(self.relation)

    @property
    def mixed(self) -> list[str]:
        """Operands of which the op mixes the weights of different outputs (see :func:`mixed`)."""
        def outputs_of(key: str) -> Any:
            shape = self.relation.trainable_vars[key].aval.shape
            if self.is_dense:
                return np.broadcast_to(np.arange(shape[-1]), shape)
            if not has_synapses(self.relation):
                return None
            outputs = targets_of(self.relation) if key == 'weight' else np.arange(shape[-1])
            return outputs.reshape(shape) if outputs.size == math.prod(shape) else None
        return mixed(self.relation, outputs_of)

    def has_closed_form(self, learner: Any) -> bool:
        """Whether the trace that leaves a window is one update of the one that enters it."""
        return (self.is_sparse or self.of_matrices or self.is_low_rank
                or upstream.chunk_rule(self.relation, learner.fast_solve) is not None)

    @property
    def has_synapses(self) -> bool:
        """Whether it is a sparse op whose pattern can be read."""
        return has_synapses(self.relation)

    @property
    def of_events(self) -> bool:
        """Whether the gradient may be summed over spikes (see :func:`ops.trace_gradient`): those
        of the model itself enter a large matrix, or many synapses.
        """
        return ((self.is_dense or self.has_synapses)
                and self.relation.trainable_vars['weight'].aval.size >= _LARGE
                and has_spikes(self.model, self.relation.x_var, upstream.SPIKE))

    @property
    def has_input(self) -> bool:
        return upstream.has_input(self.relation)

    @property
    def x_key(self) -> Any:
        return ('x', self.x_place) if self.has_input else None

    def factor_key(self, group: int) -> Any:
        return ('f', self.y_place, group)

    def trace_key(self, group: int) -> Any:
        return ('trace', self.y_place, group)

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(g.index for g in self.relation.hidden_groups)

    @property
    def paths(self) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(self.relation.trainable_paths.values()))

    @property
    def y_shape(self) -> tuple[int, ...]:
        return tuple(self.relation.y_var.aval.shape)

    def op(self, x: Any, weights: dict[str, Any]) -> Any:
        """The op itself: its own implementation, on one step's operands."""
        rel = self.relation
        positions = upstream.trainable_operands(rel.primitive, rel.eqn_params)
        operands: dict[int, Any] = {positions[k]: w for k, w in weights.items()}
        if self.has_input:
            operands[upstream.x_operand(rel.primitive)] = x
        return rel.primitive.impl(*(operands[i] for i in sorted(operands)), **rel.eqn_params)

    def gradient(self, weight_vals: Any, x: Any, cotangent: Any, precision: str,
                 backend: str | None = None, events: bool = False) -> dict[str, Any]:
        """``vjp_W(op)(x_{1..T}, cotangent_{1..T})``: ``{operand name: gradient}``."""
        weights = upstream.weights_of(self.relation, weight_vals)
        if self.has_synapses:
            return sparse_gradient(self.relation, weights, x, cotangent, backend, events)
        x_rank = len(self.relation.x_var.aval.shape) if self.has_input else 0
        return weight_vjp(self.op, weights, x, x_rank, cotangent, self.y_shape, precision,
                          backend, events)

    def operands_reading_input(self, weight_vals: Any) -> dict[str, bool]:
        """Which operands' gradients read the input (see :func:`input_dependent`)."""
        weights = upstream.weights_of(self.relation, weight_vals)
        if not self.has_input:
            return dict.fromkeys(weights, False)
        aval = self.relation.x_var.aval
        x = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return input_dependent(self.op, weights, x, self.y_shape)

    def add_to(self, grads: dict[Any, Any], weight_vals: Any, named: dict[str, Any]) -> None:
        """Route ``{operand name: gradient}`` into ``{path: gradient}``."""
        weights = upstream.weights_of(self.relation, weight_vals)
        named = {k: jnp.asarray(v).astype(weights[k].dtype) for k, v in named.items()}
        upstream.route(self.relation, named, weight_vals, grads)


def relation_views(learner: Any) -> tuple[RelationView, ...]:
    """The relations of a compiled learner."""
    relations = learner.graph.hidden_param_op_relations
    inputs, outputs = ([id(getattr(r, name)) for r in relations] for name in ('x_var', 'y_var'))
    model = upstream.model_jaxpr(learner)
    return tuple(RelationView(r, inputs.index(x), outputs.index(y), model)
                 for r, x, y in zip(relations, inputs, outputs, strict=True))


class Keys:
    """Keys of inputs, factors and traces: upstream's, and those of :class:`RelationView`.

    Upstream's are addresses of variables, other ones in every process. jax sorts a dictionary by
    its keys, so with them one training step would be many programs, and none of them would be
    found in a compilation cache.
    """

    def __init__(self, learner: Any) -> None:
        self._ours: dict[Any, Any] = {}
        for view in relation_views(learner):
            relation = view.relation
            if relation.x_var is not None:
                self._ours[upstream.input_key(relation.x_var)] = ('x', view.x_place)
            for g in view.groups:
                self._ours[upstream.factor_key(relation.y_var, g)] = view.factor_key(g)
                self._ours[upstream.trace_key(relation.y_var, g)] = view.trace_key(g)
        self._upstreams = {ours: key for key, ours in self._ours.items()}

    def ours(self, values: Any) -> Any:
        """A dictionary of upstream's, or a tuple of them, by our keys."""
        return _renamed(values, self._ours)

    def upstreams(self, values: Any) -> Any:
        """The other way."""
        return _renamed(values, self._upstreams)


def _renamed(values: Any, names: dict[Any, Any]) -> Any:
    if isinstance(values, tuple):
        return tuple(_renamed(v, names) for v in values)
    unknown = values.keys() - names.keys()
    if unknown:
        raise KeyError(f'{unknown} are not of this learner')
    # in the order of the relations: what jax gives back comes in that of the addresses
    return {name: values[key] for key, name in names.items() if key in values}


def weight_bytes(learner: Any) -> int:
    """Bytes of the parameters that have a trace."""
    # in an order: what is read first in a program is its first argument, in every process
    paths = dict.fromkeys(path for view in relation_views(learner) for path in view.paths)
    return sum(leaf.nbytes for path in paths
               for leaf in jax.tree.leaves(learner.param_states[path].value))


def gradient_bytes(learner: Any) -> int:
    """Bytes of the gradients of operations, by the graph: values may be gone."""
    avals = [v.aval for r in learner.graph.hidden_param_op_relations
             for v in r.trainable_vars.values()]
    return int(sum(a.size * a.dtype.itemsize for a in avals))


def event_weights(learner: Any) -> list[str]:
    """Parameters whose gradient is summed over spikes here, where few are not zero."""
    if jax.default_backend() != 'cpu':
        return []
    return ['.'.join(map(str, v.paths[0])) for v in relation_views(learner) if v.of_events]
