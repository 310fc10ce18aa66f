# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Which engine a learner gets, and why."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from traceops import reasons
from traceops.host import upstream
from traceops.host.relations import RelationView, relation_views, weight_bytes
from traceops.reasons import Reason

__all__ = ['LARGE_RECORD', 'NARROW', 'SHORT', 'SHORT_OF_MORE', 'SMALL', 'SMALL_TRACE', 'WIDE',
           'Plan', 'make_plan', 'why_short', 'why_small']

#: Steps of ES-D-RTRL from which on the window is faster on a CPU for the smallest nets (of one
#: state a position, and of more), and bytes of weights above which it is for two steps; for one it
#: never is. Measured with one layer of LIF, ALIF and LSTM.
SHORT, SHORT_OF_MORE, SMALL = 8, 4, 2 ** 16

#: Bytes of a D-RTRL trace, one state a position, up to which so many steps are as fast on a CPU as
#: upstream takes them. Measured with one layer of LIF and GRU; of ALIF the window always is faster.
SMALL_TRACE = {2: 2 ** 18, 3: 2 ** 16}

#: Bytes that enter and leave the operations of a step from which on a D-RTRL trace of no more than
#: so many times as much is as fast on a CPU as upstream takes it (one state a position): a window
#: stores several arrays of that size for each step. Measured with element-wise and narrow weights
#: of a layer of LIF and its readout, upstream / window: of 128 KB and 2.5 times as much 1.8, of
#: 256 KB 0.63, of 512 KB 0.57; of 512 KB and 3.5 times as much 0.66, and 6.5 times 1.0.
LARGE_RECORD, NARROW = 3 * 2 ** 16, 5

#: Numbers that a step of ES-D-RTRL records for each of the weights from which on upstream's step is
#: as fast on a CPU (one state a position). Measured with one layer of LIF, by `bench --curves`: of
#: 2 and 5 the two differ by noise (0.95 to 1.05), of 14 windows take 1.2 to 1.5 times as long.
WIDE = 6

#: Methods that the window replaces: a subclass with its own version of one keeps its own way.
_REPLACED = ('_solve_weight_gradients', '_update_etrace_data', '_get_etrace_data',
             '_assign_etrace_data', '_update_fn', '_update_fn_fwd', '_update_fn_bwd', 'etrace_grad',
             'etrace_evolve', '_make_etrace_stepper', '_update_impl', 'update')


@dataclasses.dataclass(frozen=True)
class Plan:
    """The engine of a learner: ``'window'`` or ``'upstream'`` with the reason."""

    engine: str
    reason: Reason | None = None

    @property
    def windowed(self) -> bool:
        return self.engine == 'window'


def make_plan(learner: Any) -> Plan:
    """Decide for a compiled learner. Never fails: what the window cannot serve is upstream's."""
    reason = _rule_reason(learner) or _override_reason(learner) or _graph_reason(learner)
    return Plan('upstream', reason) if reason else Plan('window')


def why_short(learner: Any, lanes: bool, at_once: bool, steps: int) -> Reason | None:
    """Why upstream's ES-D-RTRL is as fast for so few steps, if it is.

    What a window costs beside its steps is then as much as it saves; not with lanes (on jax 0.10
    upstream's step is 3.5 times as expensive), nor in the form for GPUs (``at_once``).
    """
    wide = _why_wide(learner, lanes, at_once, steps)
    if wide:
        return wide
    short = SHORT if _one_state(learner) else min(SHORT, SHORT_OF_MORE)
    if (steps >= short or (steps > 1 and weight_bytes(learner) > SMALL)
            or not isinstance(learner, upstream.IODimVjpAlgorithm)
            or _window_is_better(learner, lanes, at_once)):
        return None
    return reasons.FEW_STEPS(steps=steps, short=short)


def _why_wide(learner: Any, lanes: bool, at_once: bool, steps: int) -> Reason | None:
    """Why upstream's ES-D-RTRL is as fast for a batch so large beside its weights, if it is.

    A window saves a gradient written at every step, and writes a record instead.
    """
    if (steps == 1 or not isinstance(learner, upstream.IODimVjpAlgorithm)
            or not _one_state(learner) or _window_is_better(learner, lanes, at_once)):
        return None
    record = _recorded(learner)
    if record <= WIDE * weight_bytes(learner):
        return None
    return reasons.LARGE_BATCH(record=record / 2 ** 10, weights=weight_bytes(learner) / 2 ** 10)


def _recorded(learner: Any) -> int:
    """Bytes of what enters and leaves the operations of a step."""
    shapes = [shape for v in relation_views(learner) for shape in (
        (v.y_shape, v.relation.x_var.aval.shape) if v.has_input
        else (v.relation.hidden_groups[0].varshape,))]      # which its output is broadcast to
    return 4 * sum(map(math.prod, shapes))


def why_small(learner: Any, lanes: bool, at_once: bool, steps: int) -> Reason | None:
    """Why upstream's D-RTRL is as fast with so small a trace, if it is: for so few steps, or beside
    so large a record.
    """
    if not _one_state(learner) or _window_is_better(learner, lanes, at_once):
        return None
    size = sum(upstream.trace_bytes(learner, v.relation, g)
               for v in relation_views(learner) for g in v.relation.hidden_groups)
    if size <= SMALL_TRACE.get(steps, 0):
        return reasons.SMALL_TRACE(steps=steps, size=size / 2 ** 10)
    record = _recorded(learner)
    if record >= LARGE_RECORD and 0 < size <= NARROW * record:
        return reasons.LARGE_RECORD(record=record / 2 ** 10, size=size / 2 ** 10)
    return None


def _window_is_better(learner: Any, lanes: bool, at_once: bool) -> bool:
    """However short: it was asked for, or upstream's step is expensive."""
    return lanes or at_once or learner.traceops_settings.window is not None


def _one_state(learner: Any) -> bool:
    return all(g.num_state == 1 for g in learner.graph.hidden_groups)


def _rule_reason(learner: Any) -> Reason | None:
    config = learner.config
    if upstream.pairs_with_the_step_before(learner) and config.trace_filter == 'kappa':
        return reasons.KAPPA_BEFORE()
    if config.learning_signal == 'bootstrapped':
        return reasons.BOOTSTRAPPED()
    if config.recurrence_scope == 'sparse_n':
        return reasons.SPARSE_N()
    if getattr(learner, 'trace_dtype', None) is not None:
        return reasons.TRACE_DTYPE(dtype=learner.trace_dtype)
    return None


def _override_reason(learner: Any) -> Reason | None:
    replaced = learner._traceops.replaced
    for name in _REPLACED:
        if vars(learner).get(name) is not replaced.get(name):
            return reasons.OWN_METHOD(name=name)
        owner = next(c for c in type(learner).__mro__ if name in vars(c))
        if not owner.__module__.startswith('braintrace'):
            return reasons.OVERRIDES(owner=owner.__name__, name=name)
    return None


def _graph_reason(learner: Any) -> Reason | None:
    graph = learner.graph
    if any(g.descent is not None for g in graph.hidden_groups) or any(
            r.control_flow_context is not None for r in graph.hidden_param_op_relations):
        return reasons.SCAN_INSIDE()
    for group in graph.hidden_groups:
        for path, a, b in zip(group.hidden_paths, group.hidden_invars, group.hidden_outvars,
                              strict=True):
            if a.aval.dtype != b.aval.dtype:
                return reasons.STATE_DTYPE(path='.'.join(map(str, path)), before=str(a.aval.dtype),
                                           after=str(b.aval.dtype))
    if not graph.hidden_param_op_relations:
        return reasons.NO_OP()
    if isinstance(learner, upstream.ParamDimVjpAlgorithm):
        for relation in graph.hidden_param_op_relations:
            shared = upstream.shared_axis(relation)
            if shared:
                return reasons.SHARED_AXIS(
                    parameter=_parameter(relation), equation=relation.eqn_params['equation'],
                    shared=shared)
    for view in relation_views(learner):
        if isinstance(learner, upstream.ParamDimVjpAlgorithm) and view.mixed:
            return reasons.MIXED(parameter=_parameter(view.relation), key=view.mixed[0])
        for group in view.relation.hidden_groups:
            if not _fits(view, group):
                return reasons.POSITIONS(
                    parameter=_parameter(view.relation), op=view.relation.primitive.name,
                    y_shape=view.y_shape, group=tuple(group.varshape))
    return None


def _parameter(relation: Any) -> str:
    return '.'.join(map(str, next(iter(relation.trainable_paths.values()))))


def _fits(view: RelationView, group: Any) -> bool:
    """The op's output and the group have the same positions (up to size-one and batch axes)."""
    varshape = tuple(group.varshape)
    if not view.has_input:
        return varshape[len(varshape) - len(view.y_shape):] == view.y_shape
    return tuple(n for n in varshape if n != 1) == tuple(n for n in view.y_shape if n != 1)
