# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The types of what a call returns: those of upstream's own step, without its values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from traceops.compiler.program import StepProgram
from traceops.host import upstream
from traceops.host.relations import relation_views

__all__ = ['step_structs', 'types_of_total']


def types_of_total(learner: Any, program: StepProgram, weights: Any, names: Any) -> Any:
    """Types of the gradients that upstream's loop adds up.

    Parameters
    ----------
    learner : braintrace learner
    program : StepProgram
        Its step, recorded.
    weights : dict of pytrees of arrays
        Values of what is differentiated.
    names : dict
        Of those with a trace: name to path in the learner.

    Returns
    -------
    dict of pytrees of avals

    Raises
    ------
    TypeError
        Upstream's loop cannot be: the trace, or the sum, changes its type in it.
    """
    own = jax.tree.map(_struct, weights)
    direct = {k: jax.tree.map(_struct, program.types['sum'][k]) for k in own}
    several = len(_dtypes(learner, own, direct)) > 1
    if not (several or any(a.weak_type for a in jax.tree.leaves((own, direct)))):
        return own              # nothing is promoted on the way
    steps = learner._steps
    values = {path: learner.param_states[path].value for path in steps.paths}

    def loop(start: Any, operands: Any, total: Any, direct: Any, values: Any, index: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            trace, filters, total = carry
            if several:
                trace = steps._update(trace, operands['x'], operands['f'], operands['D'], values)
            solved, filters = steps._gradient(index, trace, filters, operands['signal'], values)
            grads = {**direct, **{name: solved[path] for name, path in names.items()}}
            for name in both:
                grads[name] = jax.tree.map(jnp.add, direct[name], grads[name])
            return (trace, filters, jax.tree.map(jnp.add, total, grads)), None

        zeros = jax.tree.map(jnp.zeros_like, total)
        return jax.lax.scan(step, (*start, zeros), None, length=1)[0][2]

    both = [k for k, summed in program.unflatten_sums(program.sum_avals, own).items()
            if k in names and summed is not None]
    return jax.eval_shape(loop, steps.start, steps.operands, own, direct, values,
                          learner.running_index.value)


def _struct(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a),
                                weak_type=bool(getattr(a, 'weak_type', False)))


def _dtypes(learner: Any, *trees: Any) -> set[Any]:
    """Of values and the learner's step."""
    return {a.dtype for a in (*jax.tree.leaves(trees), *(
        v.aval for r in learner.graph.hidden_param_op_relations
        for v in (r.y_var, *((r.x_var,) if upstream.has_input(r) else ()))), *(
        v.aval for g in learner.graph.hidden_groups for v in g.hidden_outvars))}


def step_structs(learner: Any) -> tuple[Any, dict[str, Any]]:
    """The trace and its filters as upstream begins with them, and what a step gives to the rule.

    As shapes, by our keys; to be asked for while states are initialised (then those are of one
    lane, under ``vmap``).
    """
    views, groups = relation_views(learner), learner.graph.hidden_groups
    if isinstance(learner, upstream.IODimVjpAlgorithm):
        trace: Any = jax.tree.map(_struct, learner._recorder.keys.ours(tuple(
            {key: state.value for key, state in states.items()}
            for states in (learner.etrace_xs, learner.etrace_dfs))))
    else:
        trace = {v.trace_key(g.index): upstream.trace_structs(v.relation, g)
                 for v in views for g in v.relation.hidden_groups}
    filtered = getattr(learner.config, 'trace_filter', None) == 'kappa'

    def of(group: Any, *more: int) -> jax.ShapeDtypeStruct:
        dtype = jnp.result_type(*(v.aval.dtype for v in group.hidden_outvars))
        return jax.ShapeDtypeStruct((*group.varshape, group.num_state, *more), dtype)

    return (trace, trace if filtered else {}), {
        'x': {v.x_key: _struct(v.relation.x_var.aval) for v in views if v.has_input},
        'f': {v.factor_key(g.index): of(g) for v in views for g in v.relation.hidden_groups},
        'D': [of(g, g.num_state) for g in groups], 'signal': [of(g) for g in groups]}
