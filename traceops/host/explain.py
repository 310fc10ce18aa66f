# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a learner does with each relation, or a function with its loops, and why not something
faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import brainstate
import jax
import saiunit as u
from rich.table import Table

from traceops import ops, reasons
from traceops.host import devices, faults, seen, upstream
from traceops.host.explain_calls import LoopsExplanation, of_events, of_function, of_process
from traceops.host.forms import at_once
from traceops.host.learners import is_fast
from traceops.host.relations import RelationView, event_weights, gradient_bytes, relation_views
from traceops.host.rules import make_rule
from traceops.host.transforms import is_transformed
from traceops.reasons import instead_of, with_advice
from traceops.text import render

__all__ = ['Explanation', 'LoopsExplanation', 'Row', 'explain']


@dataclasses.dataclass(frozen=True)
class Row:
    """One relation feeding one hidden group.

    ``trace_bytes`` is the trace that upstream reads and writes at every step for this pair, of all
    lanes; ``kept_bytes`` what the learner keeps of it between calls. ``used`` is what happened so
    far: what was called, and which engine served it. ``instead`` is what to write instead, where
    there is a ``reason``.
    """

    parameter: str
    primitive: str
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    group: int
    states: int
    rule: str
    engine: str
    backend: str
    reason: str
    trace_bytes: int
    kept_bytes: int
    used: str = ''
    instead: str = ''


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Rows of :func:`explain`; ``str()`` is a table, :meth:`to_dict` for machines."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def saved_bytes(self) -> int:
        """Trace memory that is not kept."""
        return sum(r.trace_bytes - r.kept_bytes for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        return {'rows': [dataclasses.asdict(r) for r in self.rows], 'notes': list(self.notes),
                'saved_bytes': self.saved_bytes}

    def __str__(self) -> str:
        table = Table(title='traceops', title_justify='left')
        for name in ('parameter', 'op', 'x', 'y', 'group', 'S', 'rule', 'engine', 'backend',
                     'trace'):
            table.add_column(name, overflow='fold')
        for r in self.rows:
            table.add_row(r.parameter, r.primitive, _shape(r.x_shape), _shape(r.y_shape),
                          str(r.group), str(r.states), r.rule, _engine_text(r), r.backend,
                          f'{_size(r.kept_bytes)} of {_size(r.trace_bytes)}')
        lines = [render(table).rstrip(), *with_advice((r.reason, r.instead) for r in self.rows)]
        lines += [f'- {note}' for note in self.notes]
        if self.saved_bytes:
            lines.append(f'trace memory not kept: {_size(self.saved_bytes)}')
        return '\n'.join(lines)


def _engine_text(row: Row) -> str:
    if row.engine == 'upstream':
        return row.engine
    return row.used or f'{row.engine} (not used yet)'


def _shape(shape: tuple[int, ...]) -> str:
    return 'x'.join(map(str, shape)) or '-'


def _size(n: int) -> str:
    unit = 2 if n >= 2 ** 20 else int(n >= 2 ** 10)
    return f'{n / 2 ** (10 * unit):.{2 if unit else 0}f} {("B", "KiB", "MiB")[unit]}'


def explain(subject: Any = None, *args: Any, **kwargs: Any) -> Explanation | LoopsExplanation:
    """Say which engine serves each relation of a learner, or what becomes of a function's loops.

    Parameters
    ----------
    subject : braintrace learner, ``ETraceVmap``, or callable
        A compiled learner; or a function with loops around learners that it makes or closes
        over, e.g. a ``train_step``. Without it: the loops that this process has traced so far.
    *args, **kwargs
        Example arguments of the function. It is traced, not run: states keep their values.

    Returns
    -------
    Explanation or LoopsExplanation
        ``print`` it, or read ``.rows`` or ``.loops``.

    Raises
    ------
    TypeError
        Neither a learner nor a function.
    ValueError
        A learner that is not compiled.
    """
    if subject is None:
        return of_process()
    inner = getattr(subject, 'module', subject)
    if not isinstance(inner, upstream.AnyLearner) and callable(subject) \
            and not isinstance(subject, brainstate.nn.Module):
        return of_function(subject, args, kwargs)
    return _explain_learner(subject, inner)


def _explain_learner(learner: Any, inner: Any) -> Explanation:
    if not isinstance(inner, upstream.AnyLearner):
        raise TypeError(f'explain() takes a braintrace learner, as braintrace.compile(...) or '
                        f'traceops.compile(...) return, or a function and its example arguments; '
                        f'got {type(learner).__name__}.')
    if not inner.is_compiled:
        raise ValueError('the learner is not compiled; call learner.compile_graph(example_input), '
                         'or make it with traceops.compile(model, rule, example_input).')
    engine, reason = _engine(learner, inner)
    rows = [_row(inner, view, g, engine, reason, _lanes(learner, inner))
            for view in relation_views(inner) for g in view.relation.hidden_groups]
    lanes = learner is not inner
    notes = _notes(inner, rows, lanes) + devices.described(
        inner, lanes, any(r.engine == 'window' for r in rows))
    return Explanation(tuple(rows), tuple(notes))


def _engine(learner: Any, inner: Any) -> tuple[str, str]:
    if not is_fast(inner):
        if not isinstance(inner, (upstream.ParamDimVjpAlgorithm, upstream.IODimVjpAlgorithm)):
            return 'upstream', reasons.OWN_ENGINE(learner=type(inner).__name__)
        return 'upstream', reasons.MADE_BEFORE()
    if isinstance(learner, upstream.ETraceVmap) and not is_fast(learner):
        return 'per-step', reasons.MADE_OUTSIDE()
    if not inner.traceops_plan.windowed:
        return 'upstream', inner.traceops_plan.reason
    calls = tuple(inner._calls)
    if calls and all(c.engine == 'per-step' for c in calls):
        return 'per-step', calls[-1].reason
    return 'window', ''


def _used(inner: Any) -> str:
    """What was called so far, and which engine served it."""
    calls = getattr(inner, '_calls', ())
    return '; '.join(dict.fromkeys(
        c.what if c.what == seen.BY_HAND else f'{c.what}: {c.engine}' for c in calls))


def _lanes(learner: Any, inner: Any) -> int:
    """Lanes of a vmapped learner, as its last call had them, or as its states have."""
    if learner is inner:
        return 1
    info = inner.graph.module_info
    for path, invar in info.hidden_path_to_invar.items():
        try:
            shape = u.math.shape(info.retrieved_model_states[path].value)
        except brainstate.BrainStateError:      # made in a jitted function, which is over
            break
        return int(shape[0]) if len(shape) > len(invar.aval.shape) else 1
    return int(getattr(inner, '_lanes', 1))


def _row(inner: Any, view: RelationView, group: Any, engine: str, reason: str,
         lanes: int) -> Row:
    factorised = isinstance(inner, upstream.IODimVjpAlgorithm)
    rel = view.relation
    x_shape = tuple(rel.x_var.aval.shape) if view.has_input else ()
    full = lanes * upstream.trace_bytes(inner, rel, group)
    parameter = '.'.join(map(str, view.paths[0]))
    carried = not is_fast(inner) or inner._carries_trace
    if engine == 'window' and not factorised and carried and not view.has_closed_form(inner):
        cause = 'is transformed' if is_transformed(rel) else f'is read by {rel.primitive.name}'
        reason = reasons.NO_CLOSED_FORM(parameter=parameter, cause=cause)
    backend = 'upstream'
    if engine == 'window':
        decision = _backend(inner, factorised, group)
        backend = decision.backend
        reason = reason or (decision.reason if jax.default_backend() == 'gpu'
                            and backend == 'jax' else '')
    return Row(
        parameter=parameter, primitive=rel.primitive.name,
        x_shape=x_shape, y_shape=view.y_shape, group=group.index, states=group.num_state,
        rule=type(inner).__name__, engine=engine,
        backend=backend, reason=reason, trace_bytes=full, kept_bytes=full if carried else 0,
        used=_used(inner), instead=instead_of(reason))


def _backend(inner: Any, factorised: bool, group: Any) -> ops.Decision:
    """What runs the scan of a group here, as ``traceops.ops`` decides it."""
    S = group.num_state
    dtype = jax.numpy.result_type(*(v.aval.dtype for v in group.hidden_outvars))

    # of the graph: states made in a jitted function have no values any more
    places = group.hidden_outvars[0].aval.shape
    places = places if len(group.hidden_outvars) == S else places[:-1]

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *places, *shape), dtype)

    operands: tuple[Any, ...] = (of(S), of(S, S), of(S))
    params: dict[str, Any] = {'kappa': None, 'states': 0, 'leaving': ''}
    if factorised:
        carry = jax.ShapeDtypeStruct((*places, S), dtype)
        operands += (carry, jax.ShapeDtypeStruct((1,), dtype))
        params = {'decay_x': 0., 'decay_f': 0., 'states': 0}
    try:
        return ops.why('es_trace_window' if factorised else 'adjoint_window', *operands,
                       backend=inner.traceops_settings.backend, **params)
    except ops.BackendError as err:     # named and not available: the call will raise too
        return ops.Decision('none', str(err))


def _notes(inner: Any, rows: list[Row], lanes: bool) -> list[str]:
    notes = []
    settings = getattr(inner, 'traceops_settings', None)
    calls_of: seen.Calls | None = getattr(inner, '_calls', None)
    calls = tuple(calls_of or ())
    if settings is not None and any(r.engine == 'window' for r in rows):
        bound = make_rule(inner, lanes, at_once(settings)).bound
        window = settings.window or f'chosen within {bound}'
        carried = f'; carry_trace={settings.carry_trace}' if isinstance(
            inner, upstream.ParamDimVjpAlgorithm) else ''       # the only ones that it acts on
        notes.append(f'window: {window}; precision {settings.precision}{carried}')
    told = {r.reason for r in rows}
    notes += [f'{c.what} in {c.where}, steps: {c.steps}; {c.engine} ({c.reason})'
              + f'\n  instead: {c.instead}' * bool(c.instead and c.reason not in told)
              for c in calls]
    outside = calls_of.outside_jit if calls_of is not None else 0
    if outside > 1:
        notes.append(f'{outside} calls were made outside jit, where each is traced again, and '
                     'compiled if it computes something new: tenths of a second to seconds, where '
                     'the program itself takes milliseconds. Call it in a function decorated with '
                     '@brainstate.transform.jit')
    notes += faults.notes(inner)
    if jax.default_backend() == 'gpu' and getattr(inner, '_steps', None) is not None \
            and inner._carries_trace:
        notes.append(f'a single step, by hand: {inner._steps.why()}')
    if any(r.engine == 'window' for r in rows):
        notes += of_events(event_weights(inner))
    return notes + _of_the_trace(inner, rows, calls)


#: Bytes of a trace whose forming takes so long that a note is worth reading.
_LARGE_TRACE = 2 ** 20


def _of_the_trace(inner: Any, rows: list[Row], calls: Sequence[seen.Call]) -> list[str]:
    """Whether the trace that calls leave is formed, and what would do without."""
    kept = sum(r.kept_bytes for r in rows)
    if not (kept > 2 * gradient_bytes(inner) and calls and any(r.engine == 'window' for r in rows)
            and isinstance(inner, upstream.ParamDimVjpAlgorithm)):
        return []
    if not _outlives_its_program(inner):
        return ['made in the program that uses it, which no trace leaves: one that nothing there '
                'reads is not formed']
    if all(c.what == 'etrace_grad' and c.from_zero for c in calls):
        return [f'every call so far was an etrace_grad from a zero trace, and forms the one that '
                f'it leaves ({_size(kept)}). If all are, make the learner with '
                f'traceops.configured(carry_trace=False): the gradients are the same, and no trace '
                f'is allocated']
    if kept < _LARGE_TRACE:
        return []
    return [f'the trace ({_size(kept)}) is a result of every function that uses the learner, and '
            f'is formed there. Where each starts with a reset of all states, make the learner in '
            f'the jitted function itself, by braintrace.compile: what nothing reads is not formed '
            f'then']


def _outlives_its_program(inner: Any) -> bool:
    """Not if it was made in a jitted function, which is over."""
    try:
        return all(state.value is not None for state in inner.etrace_bwg.values())
    except brainstate.BrainStateError:
        return False
