# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Every private name of braintrace that traceops leans on, in one place.

Nothing else in the package imports from ``braintrace._*``. A name that has moved fails here,
with the supported versions in the message; ``tests/host/test_upstream.py`` checks each one.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import braintrace
import jax
import jax.numpy as jnp

from traceops.errors import UnsupportedVersionError
from traceops.host.versions import SUPPORTED

__all__ = ['PRIVATE_NAMES']

#: module -> names used from it; the test that notices when upstream moves walks this table.
PRIVATE_NAMES: dict[str, tuple[str, ...]] = {
    'braintrace._algorithm.sequence': (
        'SequenceDriverMixin', '_check_chunk_size', '_check_mask', '_sequence_length',
        '_REDUCTIONS', '_LOSS_OUTPUTS'),
    'braintrace._algorithm.vjp_base': ('ETraceVjpAlgorithm',),
    'braintrace._algorithm.vjp_graph_executor': ('ETraceVjpGraphExecutor',),
    'braintrace._algorithm.param_dim_vjp': (
        '_solve_param_dim_weight_gradients', '_update_param_dim_etrace_scan_fn',
        'relation_instant_term'),
    'braintrace._algorithm.io_dim_vjp': ('_reduce_to_param_shape',),
    'braintrace._algorithm._common': ('_extract_leaf', '_route_grads_by_path', '_update_dict'),
    'braintrace._op': (
        'ETP_RULES_DT_TO_T', 'ETP_RULES_INIT_DRTRL', 'ETP_RULES_XY_TO_DW', 'etp_conv_p',
        'get_fast_path_rules', 'get_pp_x_repr', 'get_trainable_invars', 'get_x_invar_index',
        'is_batched_primitive', 'etp_elemwise_p', 'etp_emb_p', 'etp_emb_v_p', 'etp_gmm_p',
        'etp_gmv_p', 'etp_lora_mm_p', 'etp_lora_mv_p', 'etp_mm_p', 'etp_mv_p', 'etp_sp_mm_p',
        'etp_sp_mv_p'),
    'braintrace._op.sparse': ('_unwrap_sparse_mat',),
    'braintrace._op.einsum': ('parse_etp_einsum', 'etp_einsum_p'),
    'braintrace._misc': ('etrace_df_key', 'etrace_x_key'),
    'braintrace._compiler.hidden_group': ('_transition_contains_while',),
}


def _private(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as err:
        raise UnsupportedVersionError(
            f'{module}.{name} is not in braintrace {braintrace.__version__}. traceops supports '
            f'braintrace {SUPPORTED["braintrace"]}; install one of those, or run without '
            f'traceops.install().') from err


_sequence = 'braintrace._algorithm.sequence'
SequenceDriver = _private(_sequence, 'SequenceDriverMixin')
VjpAlgorithm = _private('braintrace._algorithm.vjp_base', 'ETraceVjpAlgorithm')
ParamDimVjpAlgorithm = braintrace.ParamDimVjpAlgorithm
IODimVjpAlgorithm = braintrace.IODimVjpAlgorithm
ETraceVmap = braintrace.ETraceVmap
AnyLearner = braintrace.ETraceAlgorithm

check_chunk_size: Callable[[Any], int | None] = _private(_sequence, '_check_chunk_size')
check_mask: Callable[[Any, int], jax.Array] = _private(_sequence, '_check_mask')
sequence_length: Callable[[tuple[Any, ...]], int] = _private(_sequence, '_sequence_length')
REDUCTIONS: tuple[str, ...] = _private(_sequence, '_REDUCTIONS')
LOSS_OUTPUTS: tuple[str, ...] = _private(_sequence, '_LOSS_OUTPUTS')

_op = 'braintrace._op'
_elementwise_p = _private(_op, 'etp_elemwise_p')
_einsum_p = _private('braintrace._op.einsum', 'etp_einsum_p')
_parse_einsum = _private('braintrace._op.einsum', 'parse_etp_einsum')
_conv_p = _private(_op, 'etp_conv_p')
_dense_ps = _private(_op, 'etp_mm_p'), _private(_op, 'etp_mv_p')
_grouped_ps = _private(_op, 'etp_gmm_p'), _private(_op, 'etp_gmv_p')
_embedding_ps = _private(_op, 'etp_emb_p'), _private(_op, 'etp_emb_v_p')
_lora_ps = _private(_op, 'etp_lora_mm_p'), _private(_op, 'etp_lora_mv_p')
_sparse_ps = _private(_op, 'etp_sp_mm_p'), _private(_op, 'etp_sp_mv_p')
_unwrapped = _private('braintrace._op.sparse', '_unwrap_sparse_mat')
_init_drtrl = _private(_op, 'ETP_RULES_INIT_DRTRL')
_dt_to_t = _private(_op, 'ETP_RULES_DT_TO_T')
_xy_to_dw = _private(_op, 'ETP_RULES_XY_TO_DW')
_fast_path_rules = _private(_op, 'get_fast_path_rules')
_x_repr = _private(_op, 'get_pp_x_repr')
_is_batched_primitive = _private(_op, 'is_batched_primitive')
trainable_operands = _private(_op, 'get_trainable_invars')
x_operand = _private(_op, 'get_x_invar_index')

_solve_param_dim = _private('braintrace._algorithm.param_dim_vjp',
                            '_solve_param_dim_weight_gradients')
_step_param_dim = _private('braintrace._algorithm.param_dim_vjp',
                           '_update_param_dim_etrace_scan_fn')
_instant_term = _private('braintrace._algorithm.param_dim_vjp', 'relation_instant_term')
reduce_to_parameter = _private('braintrace._algorithm.io_dim_vjp', '_reduce_to_param_shape')
leaf_of = _private('braintrace._algorithm._common', '_extract_leaf')
route = _private('braintrace._algorithm._common', '_route_grads_by_path')
add_gradient = _private('braintrace._algorithm._common', '_update_dict')
input_key = _private('braintrace._misc', 'etrace_x_key')
factor_key = _private('braintrace._misc', 'etrace_df_key')
_has_while = _private('braintrace._compiler.hidden_group', '_transition_contains_while')
_GraphExecutor = _private('braintrace._algorithm.vjp_graph_executor', 'ETraceVjpGraphExecutor')


# -- questions about a relation ------------------------------------------------------------

def trace_key(y_var: Any, group: int) -> Any:
    """Key of the trace of an op's output and a hidden group."""
    return (id(y_var), group)


#: The primitive of surrogate gradients, whose values are spikes.
SPIKE = 'heaviside_surrogate_gradient'


def stands_for_a_program(primitive: Any) -> bool:
    """Whether a primitive is one for how it is traced or differentiated, and is computed as what
    its implementation says: an operation of braintrace, or spikes (beside whose derivative, which
    does not bind the primitive, they are computed as such).
    """
    return isinstance(primitive, braintrace.ETPPrimitive) or primitive.name == SPIKE


def model_jaxpr(learner: Any) -> Any:
    """One step of the model, in which every relation has its variables."""
    return learner.graph.module_info.jaxpr


def has_input(relation: Any) -> bool:
    """Whether the op reads an input at all (the element-wise op does not)."""
    return relation.x_var is not None and relation.primitive is not _elementwise_p


def shared_axis(relation: Any) -> str | None:
    """The axes of an einsum over which upstream's trace keeps one slot for many positions."""
    if relation.primitive is not _einsum_p:
        return None
    return _parse_einsum(relation.eqn_params['equation']).shared or None


def is_matmul(relation: Any) -> bool:
    """Whether the op is a product with a matrix as :func:`braintrace.matmul` makes it."""
    return relation.primitive in _dense_ps


def is_other_matrix(relation: Any) -> bool:
    """Whether the op is a product with a matrix for each group, or with one-hot inputs."""
    return relation.primitive in (*_grouped_ps, *_embedding_ps)


def is_low_rank(relation: Any) -> bool:
    """Whether the op is a product with two matrices, ``lora_b`` and ``lora_a``."""
    return relation.primitive in _lora_ps


def sparse_matrix(relation: Any) -> Any:
    """The matrix that holds the pattern of a sparse op; ``None`` for another op."""
    if relation.primitive not in _sparse_ps:
        return None
    return _unwrapped(relation.eqn_params['sparse_mat'])


def chunk_rule(relation: Any, fast_solve: bool) -> Callable[..., Any] | None:
    """Upstream's closed form of the trace update over a window, where it has one."""
    rules = _fast_path_rules(relation.primitive)
    if not fast_solve or rules is None or not rules.applicable(relation.eqn_params):
        return None
    return rules.chunk


def rules_of(relation: Any) -> Any:
    """Upstream's closed-form kernels for the op of a relation."""
    return _fast_path_rules(relation.primitive)


def weights_of(relation: Any, weight_vals: dict[Any, Any]) -> dict[str, Any]:
    """``{operand name: weight leaf}`` of a relation."""
    return {key: leaf_of(weight_vals[relation.trainable_paths[key]],
                         relation.trainable_leaf_indices[key])
            for key in relation.trainable_vars}


def x_representation(relation: Any) -> Callable[[Any], Any] | None:
    """How the input enters the ES-D-RTRL input filter, when not as it is (embedding: one-hot)."""
    fn = _x_repr(relation.primitive)
    if fn is None:
        return None
    avals = {k: v.aval for k, v in relation.trainable_vars.items()}
    return lambda x: fn(x, avals)


# -- the trace itself ----------------------------------------------------------------------

def solve_param_dim(learner: Any, relations: Sequence[Any], trace: dict[Any, Any],
                    signals: Sequence[Any], weight_vals: dict[Any, Any]) -> dict[Any, Any]:
    """Contract a D-RTRL trace with a signal per hidden group: ``{path: gradient}``."""
    grads: dict[Any, Any] = {}
    _solve_param_dim(trace, grads, signals, relations, weight_vals,
                     fast_solve=learner.fast_solve)
    return grads


def is_batched(relation: Any) -> bool:
    """Whether the op of a relation has a leading batch axis of its own."""
    return bool(_is_batched_primitive(relation.primitive))


def roll_step(learner: Any, relations: Sequence[Any], weight_vals: dict[Any, Any],
              trace: dict[Any, Any], factors: tuple[Any, Any, Any]) -> dict[Any, Any]:
    """One step of upstream's D-RTRL trace update, for these relations."""
    stepped = [r for r in relations if is_stepped(learner, r)]
    new = dict(_step_param_dim(
        trace, factors, weight_path_to_vals=weight_vals,
        hidden_param_op_relations=[r for r in relations if not any(r is s for s in stepped)],
        fast_solve=learner.fast_solve, trace_dtype=learner.trace_dtype)[0])
    xs, fs, jacobians = factors
    for relation in stepped:
        x = xs[input_key(relation.x_var)] if has_input(relation) else None
        for group in relation.hidden_groups:
            key = trace_key(relation.y_var, group.index)
            instant = _instant_term(
                relation, group, x, fs[factor_key(relation.y_var, group.index)],
                weights_of(relation, weight_vals), fast_solve=learner.fast_solve,
                trace_dtype=learner.trace_dtype)
            carried = _times_jacobian(relation, x, jacobians[group.index], trace[key])
            new[key] = jax.tree.map(jnp.add, carried, instant)
    return new


def is_stepped(learner: Any, relation: Any) -> bool:
    """Whether upstream has no closed form of the update (for these parameters of the op)."""
    rules = _fast_path_rules(relation.primitive)
    return not (learner.fast_solve and rules is not None
                and rules.applicable(relation.eqn_params))


def _times_jacobian(relation: Any, x: Any, jacobian: Any, trace: dict[str, Any]) -> dict[str, Any]:
    """The trace of the last step, ``[..., S]``, times the Jacobian of this one, state by state.

    Upstream maps the op's rule over both axes of states and sums over one: of six states and more
    jaxlib 0.10.2 compiles that wrongly for a CPU (see :mod:`traceops.host.faults`).
    """
    if is_batched(relation) and x is not None and jacobian.ndim == x.ndim + 1:
        jacobian = jacobian[None]           # of one lane: the batch axis that the op insists on
    states = range(jacobian.shape[-1])

    def row(i: int) -> dict[str, Any]:
        terms = [_dt_to_t[relation.primitive](
            jacobian[..., i, j], {k: a[..., j] for k, a in trace.items()},
            **relation.eqn_params) for j in states]
        return jax.tree.map(lambda *parts: sum(parts), *terms)

    return jax.tree.map(lambda *rows: jnp.stack(rows, -1), *(row(i) for i in states))


def solve_factorised(relation: Any, x: Any, cotangent: Any,
                     weight_vals: dict[Any, Any]) -> dict[str, Any]:
    """Upstream's weight-gradient rule on a (filtered) input: ``{operand name: gradient}``."""
    weights = weights_of(relation, weight_vals)
    grads = _xy_to_dw[relation.primitive](x, cotangent, weights, **relation.eqn_params)
    return {key: reduce_to_parameter(value, weights[key]) for key, value in grads.items()}


def trace_bytes(learner: Any, relation: Any, group: Any) -> int:
    """Bytes of upstream's trace of one relation and group (per lane, under ``vmap``)."""
    y = relation.y_var.aval
    if learner.config.is_factorized:
        x = relation.x_var.aval.size if has_input(relation) else 0
        return int((x + y.size * group.num_state) * y.dtype.itemsize)
    return int(sum(a.size * a.dtype.itemsize
                   for a in jax.tree.leaves(trace_structs(relation, group))))


def trace_structs(relation: Any, group: Any) -> Any:
    """A D-RTRL trace of one relation and group (per lane, under ``vmap``), as shapes."""
    init = _init_drtrl[relation.primitive]
    extra = {'group': group} if relation.primitive is _elementwise_p else (
        {'eqn_params': relation.eqn_params} if relation.primitive is _conv_p else {})
    return jax.eval_shape(lambda: init(relation.x_var, relation.y_var, relation.trainable_vars,
                                       group.num_state, **extra))


# -- the step ------------------------------------------------------------------------------

def pairs_with_the_step_before(learner: Any) -> bool:
    """Whether the signal of a call is on the hidden values that it starts from, which the trace of
    the step before pairs with; the rest of its gradient is direct (``vjp_method='multi-step'``).
    """
    return bool(learner.vjp_method == 'multi-step')


#: Whether a parameter that no hidden state follows has a gradient with a single-step VJP
#: (braintrace 0.2.8; before it is zero).
TRAINS_READOUTS = hasattr(VjpAlgorithm, '_has_hidden_output_bypass')


def has_bypass(learner: Any) -> bool:
    """Whether there is a signal on previous hidden values: of a multi-step VJP, or of an output
    that reads one around the new ones (braintrace 0.2.8).
    """
    asks = getattr(learner, '_has_hidden_output_bypass', None)
    return pairs_with_the_step_before(learner) or (bool(asks()) if asks is not None else False)


def transition_rows(group: Any, hidden_vals: Sequence[Any], input_vals: Sequence[Any]) -> Any:
    """``D`` of a position-diagonal group, one reverse pass per row.

    The rows stay separate arrays until the last moment: upstream's vmapped form puts the
    states on a trailing axis, which a CPU cannot vectorise.
    """
    def row(i: int) -> Any:
        def component(hid: Sequence[Any]) -> Any:
            new = group.concat_hidden(group.transition(hid, input_vals))
            return new[..., i]
        out, vjp = jax.vjp(component, list(hidden_vals))
        return group.concat_hidden(vjp(jnp.ones_like(out))[0])

    return jnp.stack([row(i) for i in range(group.num_state)], axis=-2)


def keep_rows_separate(executor: Any) -> None:
    """A graph executor keeps its Jacobian rows separate from now on (same numbers, other layout).

    The derivatives of a graph's parts are kept as programs of values that nothing is
    differentiated by: else each call would trace them anew, through all transformations around
    it, and again where the step is differentiated.
    """
    weights, hidden = executor._compute_hid2weight_jacobian, executor._compute_hid2hid_jacobian
    known: dict[int, Any] = {}

    def derived(of: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that belongs to a part of the graph, kept as long as the graph."""
        if id(of) not in known:
            known[id(of)] = of, jax.jit(function, inline=True)
        return lambda *values: known[id(of)][1](*jax.lax.stop_gradient(values))

    @functools.wraps(weights)
    def hid2weight(intermediate_values: Any) -> Any:
        relations = executor.graph.hidden_param_op_relations
        if any(r.control_flow_context is not None for r in relations):
            return weights(intermediate_values)
        read = _read_by_factors(relations)
        return derived(relations, lambda values: weights(dict(zip(read, values, strict=True))))(
            [intermediate_values[v] for v in read])

    @functools.wraps(hidden)
    def hid2hid(intermediate_values: Any) -> Any:
        groups = executor.graph.hidden_groups
        if executor.full_jacobian or not all(_rows_apply(g) for g in groups):
            return hidden(intermediate_values)
        return [derived(g, functools.partial(transition_rows, g))(
            [intermediate_values[v] for v in g.hidden_invars],
            [intermediate_values[v] for v in g.transition_jaxpr_constvars]) for g in groups]

    vars(executor).update(_compute_hid2weight_jacobian=hid2weight,
                          _compute_hid2hid_jacobian=hid2hid)


def _read_by_factors(relations: Sequence[Any]) -> list[Any]:
    """Variables of the step that the inputs and factors of relations are made of."""
    read: dict[Any, None] = {}
    for relation in relations:
        made = (v for j in relation.y_to_hidden_group_jaxprs for v in (*j.constvars, *j.invars))
        read.update(dict.fromkeys((relation.y_var, *made)))
        if relation.x_var is not None:
            read[relation.x_var] = None
    return list(read)


def _rows_apply(group: Any) -> bool:
    return bool(group.is_diagonal_recurrence and group.descent is None and group.snap is None
                and not _has_while(group.transition_jaxpr)
                and all(a.aval.dtype == b.aval.dtype for a, b in zip(
                    group.hidden_invars, group.hidden_outvars, strict=True)))
