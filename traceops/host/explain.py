# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a learner does with each relation, or a function with its loops, and why not something
faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import brainstate
import jax
import saiunit as u
from rich.table import Table

from traceops import ops, reasons
from traceops.host import devices, faults, loops, patch, seen, upstream
from traceops.host.forms import at_once
from traceops.host.learners import is_fast
from traceops.host.relations import RelationView, event_weights, relation_views
from traceops.host.rules import make_rule
from traceops.host.transforms import is_transformed
from traceops.reasons import instead_of
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
        lines = [render(table).rstrip(), *_reasons((r.reason, r.instead) for r in self.rows)]
        lines += [f'- {note}' for note in self.notes]
        if self.saved_bytes:
            lines.append(f'trace memory not kept: {_size(self.saved_bytes)}')
        return '\n'.join(lines)


def _reasons(given: Iterable[tuple[str, str]]) -> list[str]:
    """Reasons, each once, with what to write instead."""
    return [f'- {reason}' + f'\n  instead: {instead}' * bool(instead)
            for reason, instead in dict.fromkeys(given) if reason]


def _engine_text(row: Row) -> str:
    if row.engine == 'upstream':
        return row.engine
    return row.used or f'{row.engine} (not used yet)'


def _shape(shape: tuple[int, ...]) -> str:
    return 'x'.join(map(str, shape)) or '-'


def _size(n: int) -> str:
    unit = 2 if n >= 2 ** 20 else int(n >= 2 ** 10)
    return f'{n / 2 ** (10 * unit):.{2 if unit else 0}f} {("B", "KiB", "MiB")[unit]}'


@dataclasses.dataclass(frozen=True)
class LoopsExplanation:
    """Loops of :func:`explain`; ``str()`` is a table, :meth:`to_dict` for machines."""

    loops: tuple[loops.Loop, ...]
    calls: tuple[seen.Call, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        return {'loops': [{**dataclasses.asdict(loop), 'instead': dict(_declined(loop))}
                          for loop in self.loops],
                'calls': [{**dataclasses.asdict(call), 'instead': call.instead}
                          for call in self.calls]}

    def __str__(self) -> str:
        if not self.loops and not self.calls:
            return ('No fast learner was seen at work. A learner is fast when it is made '
                    'after traceops.install(), or inside a function that is decorated with '
                    '@traceops.accelerate. Calls and loops are seen when they are traced: a '
                    'function that was jitted and called before is not traced again.')
        return '\n'.join([*([self._calls()] if self.calls else []),
                          *([self._loops()] if self.loops else [])])

    def _calls(self) -> str:
        table = Table(title='traceops: calls', title_justify='left')
        for name in ('call', 'what', 'learner', 'steps', 'engine', 'because'):
            table.add_column(name, overflow='fold')
        for call in self.calls:
            table.add_row(call.where, call.what, call.learner, str(call.steps), call.engine,
                          call.reason)
        return '\n'.join([render(table).rstrip(), *_reasons(
            (call.reason, call.instead) for call in self.calls if call.instead)])

    def _loops(self) -> str:
        table = Table(title='traceops: loops over time', title_justify='left')
        for name in ('loop', 'steps', 'learner', 'gradients are formed', 'because'):
            table.add_column(name, overflow='fold')
        for loop in self.loops:
            for learner in loop.deferred:
                table.add_row(loop.where, str(loop.steps), learner, loop.how_often,
                              'the loop only adds them up')
            for learner, reason in loop.forward:
                table.add_row(loop.where, str(loop.steps), learner, 'none is taken', reason or
                              f'its trace is formed {loop.how_often}')
            for learner, reason in loop.kept:
                table.add_row(loop.where, str(loop.steps), learner, 'at every step', reason)
        lines = [render(table).rstrip()]
        if any(loop.deferred for loop in self.loops):
            lines.append('- formed after the steps: no trace is rolled inside the loop; it keeps '
                         'the factors of each step instead. What the loop returns is the same.')
        if any(loop.kept for loop in self.loops):
            lines.append('- at every step: the loop runs as it is written.')
        lines += _reasons(one for loop in self.loops for one in _declined(loop))
        lines += [f'- {loop.where}: {said}' for loop in self.loops
                  for said in (*loop.products, *loop.simulation,
                               *_of_events(loop.events))]
        return '\n'.join(lines)


def _of_events(names: Sequence[str]) -> list[str]:
    return [f'spikes enter {", ".join(names)}: of a long window in which few are not zero, the '
            'gradient is the sum over those'] if names else []


def _declined(loop: loops.Loop) -> list[tuple[str, str]]:
    """Why learners of a loop run as they are written, and what to write instead."""
    return [(reason, instead_of(reason)) for _, reason in (*loop.kept, *loop.forward) if reason]


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
        return LoopsExplanation(loops.known(), seen.known())
    inner = getattr(subject, 'module', subject)
    if not isinstance(inner, upstream.AnyLearner) and callable(subject) \
            and not isinstance(subject, brainstate.nn.Module):
        return _explain_function(subject, args, kwargs)
    return _explain_learner(subject, inner)


def _explain_function(fn: Callable[..., Any], args: Any, kwargs: Any) -> LoopsExplanation:
    while True:                     # a jitted function may have been traced before
        inside = getattr(fn, 'origin_fun', None) or getattr(fn, '__wrapped__', None)
        if inside is None:
            break
        fn = inside
    found: list[loops.Loop] = []
    calls: list[seen.Call] = []
    tokens = loops.watching.set(found), seen.watching.set(calls)
    try:
        with patch.enabled():
            brainstate.transform.make_jaxpr(fn)(*args, **kwargs)
    finally:
        loops.watching.reset(tokens[0])
        seen.watching.reset(tokens[1])
    return LoopsExplanation(tuple(dict.fromkeys(found)), tuple(dict.fromkeys(calls)))


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
    notes += faults.notes(inner, all(r.engine == 'window' for r in rows))
    if jax.default_backend() == 'gpu' and getattr(inner, '_steps', None) is not None \
            and inner._carries_trace:
        notes.append(f'a single step, by hand: {inner._steps.why()}')
    if any(r.engine == 'window' for r in rows):
        notes += _of_events(event_weights(inner))
    if _trace_is_in_the_way(inner, rows, calls):
        notes.append(f'the carried trace ({_size(sum(r.kept_bytes for r in rows))}) dominates '
                     f'memory; every call so far was an etrace_grad from a zero trace. If all are, '
                     f'make the learner with traceops.configured(carry_trace=False): the gradients '
                     f'are the same, and no trace is allocated')
    return notes


def _trace_is_in_the_way(inner: Any, rows: list[Row], calls: Sequence[seen.Call]) -> bool:
    """Whether a trace is carried that no call so far has read."""
    kept = sum(r.kept_bytes for r in rows)
    return bool(
        kept and any(r.engine == 'window' for r in rows)
        and isinstance(inner, upstream.ParamDimVjpAlgorithm)
        and calls and all(c.what == 'etrace_grad' and c.from_zero for c in calls)
        and kept > 2 * _weight_bytes(inner))


def _weight_bytes(inner: Any) -> int:
    avals = [v.aval for r in inner.graph.hidden_param_op_relations
             for v in r.trainable_vars.values()]
    return sum(a.size * a.dtype.itemsize for a in avals)
