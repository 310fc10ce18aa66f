# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``etrace_grad`` and ``etrace_evolve``, a window at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import saiunit as u

from traceops import reasons
from traceops.compiler.products import describe
from traceops.compiler.program import Fold, StepProgram, trace_step, traced_step
from traceops.compiler.types import CarryTypeError, typed
from traceops.engine.windows import run_windows, run_windows_back
from traceops.host import upstream
from traceops.host.forms import (
    Simulator,
    by_form,
    form_of_loops,
    forms_of,
    is_outside_jit,
    simulator_of,
)
from traceops.host.recorder import split_states
from traceops.host.rule import whole, with_every_step
from traceops.host.rules import make_rule
from traceops.host.seen import note
from traceops.host.sequence import (
    NotAStepError,
    check_choice,
    check_states,
    results,
    unjitted,
    why_not_a_step,
    windows,
    windows_or_steps,
)
from traceops.host.types import types_of_total
from traceops.reasons import Reason

__all__ = ['evolve', 'gradient']


def gradient(
    learner: Any,
    driver: Any,
    upstream_way: Callable[..., Any],
    sequences: tuple[Any, ...],
    step_fn: Callable[..., Any],
    *,
    mask: Any = None,
    chunk_size: int | None = None,
    weights: Any = None,
    reduction: str = 'mean',
    loss_output: str = 'per_step',
    has_aux: bool = False,
    return_value: bool = False,
) -> Any:
    """Upstream's ``etrace_grad`` with the window engine inside.

    ``driver`` is what the step function calls (the learner, or its vmapped wrapper);
    ``upstream_way`` is upstream's own method, used wherever the window does not apply.
    """
    said = functools.partial(_note, learner, 'etrace_grad', sequences)

    def steps() -> Any:
        return upstream_way(
            *sequences, step_fn=step_fn, mask=mask, chunk_size=chunk_size, weights=weights,
            reduction=reduction, loss_output=loss_output, has_aux=has_aux,
            return_value=return_value)

    def as_upstream(reason: Reason) -> Any:
        said('per-step', reason)
        return steps()

    learner._assert_compiled()
    _enter(learner, driver)
    check_choice('reduction', reduction, upstream.REDUCTIONS)
    check_choice('loss_output', loss_output, upstream.LOSS_OUTPUTS)
    length = upstream.sequence_length(sequences)
    mask_ = upstream.check_mask(mask, length)
    if not learner.traceops_plan.windowed or upstream.check_chunk_size(chunk_size) is not None:
        return as_upstream(learner.traceops_plan.reason or reasons.CHUNKS())
    if unjitted(learner):
        return as_upstream(reasons.UNJITTED())
    check_states(learner, driver)
    weights = driver._seq_param_states if weights is None else weights
    xs, recorder = (sequences, mask_), learner._recorder

    def in_windows(rules: Sequence[Any], here: bool) -> Any:
        rule = rules[0]
        program_of = _program(
            learner, _gradient_step(learner, step_fn, weights, has_aux), xs, rule,
            lambda rule: {'invariant': recorder.invariant, 'in_loop': rule.in_loop},
            tuple(recorder.ports.values()))
        types = _types(learner, program_of(rule), weights, rule)

        def run(its: Any) -> Any:
            program = program_of(its)
            K, twice = windows(its, program, length)
            out = _run_gradient(learner, its, program, weights, types, xs, K, twice)
            if its is rule and here:
                said('window', _said(program, K, twice) + _RECALLED * its.recalled)
            return out
        states, carry, total, losses, aux = _by_form(rules, run, sequences)
        program_of(rule).store(states)
        rule.store(carry)
        return results(total, losses, aux, mask_, reduction, loss_output, has_aux, return_value)
    return windows_or_steps(_rules(learner, driver), length, in_windows, steps, said,
                            _is_outside_jit(learner, sequences))


def _program(learner: Any, step: Callable[..., Any], xs: Any, rule: Any,
             options_of: Callable[[Any], dict[str, Any]], constants: Any = (),
             ) -> Callable[[Any], StepProgram]:
    """Of a rule, the step as a program in its form, traced once.

    ``options_of``: of a rule, other arguments of :func:`trace_step`.
    """
    tape, settings = learner._recorder.tape, learner.traceops_settings

    @functools.cache
    def program_of(rule: Any) -> StepProgram:
        return trace_step(
            traced, xs, tape=tape, constants=constants, counter=learner.running_index,
            simulate=simulator_of(settings, rule.at_once), stands_for=upstream.stands_for_a_program,
            **options_of(rule), **form_of_loops(rule.at_once))

    with _recording(learner):
        traced = traced_step(step, xs, (*tape, *constants))
    program = program_of(rule)
    if program.count != 1 or learner._recorder.several_steps:
        raise NotAStepError(why_not_a_step(learner, program))
    return program_of


def _enter(learner: Any, driver: Any) -> None:
    """Remember how a call begins: whether from a zero trace, and in how many lanes."""
    learner._entered_from_zero = learner._trace_is_fresh()
    if driver is not learner:
        learner._lanes = _lanes_of(learner)


def _note(learner: Any, what: str, sequences: Any, engine: str, reason: str) -> None:
    """Remember a call for ``explain``."""
    learner._calls.outside_jit += _is_outside_jit(learner, sequences)
    note(learner, what, upstream.sequence_length(sequences), engine, reason,
         learner._entered_from_zero)


def _is_outside_jit(learner: Any, sequences: Any) -> bool:
    return is_outside_jit((sequences, [st.value for st in learner.param_states.values()]))


def _lanes_of(learner: Any) -> int:
    info = learner.graph.module_info
    shapes = [u.math.shape(info.retrieved_model_states[path].value)
              for path in info.hidden_path_to_invar]
    return int(shapes[0][0]) if shapes else 1


_RECALLED = '; the steps of etrace_evolve before it are gone through again: no trace is read'


def _said(program: StepProgram, K: int, twice: bool = False) -> str:
    """What ``explain`` says of a call in windows."""
    length = f'{K} steps per window' + ', each simulated twice' * twice
    said = program.simulate.describe() if isinstance(program.simulate, Simulator) else []
    return '; '.join([length, *describe(program.partition.products), *said])


def _gradient_step(learner: Any, step_fn: Callable[..., Any], weights: Any,
                   has_aux: bool) -> Callable[..., Any]:
    """One step: gradients that do not pass through the trace, the signals, the record."""
    recorder = learner._recorder

    def objective(slices: Any, weight: Any) -> Any:
        for port in recorder.ports.values():
            _ = port.value          # differentiated, so it has to be read on every path
        result = step_fn(*slices)
        loss, aux = result if has_aux else (result, None)
        if jnp.ndim(loss) != 0:
            raise ValueError(
                f'with chunk_size=None, step_fn must return a scalar loss, got shape '
                f'{jnp.shape(loss)}. Reduce over the batch and feature axes inside step_fn.')
        return jnp.sum(weight * loss), (loss, aux)

    targets = {'weights': dict(weights.items()), 'ports': recorder.ports}
    grad_fn = brainstate.transform.grad(objective, targets, has_aux=True)

    def step(slices: Any, weight: Any) -> Any:
        grads, (loss, aux) = grad_fn(slices, weight)
        signals = {name: [split_states(s) for s in port]
                   for name, port in grads['ports'].items()}
        return {'sum': grads['weights'], 'record': signals, 'loss': loss, 'aux': aux}

    return step


def _types(learner: Any, program: StepProgram, weights: Any, rule: Any) -> Any:
    """Types of the gradients, as upstream's loop leaves them."""
    values = {name: state.value for name, state in weights.items()}
    try:
        return types_of_total(learner, program, values, _names_of(learner, weights, rule.paths))
    except TypeError as err:
        raise CarryTypeError(reasons.SUM_TYPE(error=err)) from err


def _run_gradient(learner: Any, rule: Any, program: StepProgram, weights: Any, types: Any,
                  xs: Any, K: int, twice: bool) -> Any:
    """States and what the rule carries, to be stored; gradients, losses, and what is beside them.
    """
    weight_vals = {path: st.value for path, st in learner.param_states.items()}
    names = _names_of(learner, weights, rule.paths)

    def record_of(out: Any) -> Any:
        return {**learner._recorder.read(out['tape']), **out['record']}

    def fold_of(carry: Any) -> Fold | None:
        if not rule.folds:
            return None
        return Fold(rule.inner(carry[0]), lambda inner, out: rule.fold_step(inner, record_of(out)),
                    rule.backward)

    def after_window(carry: Any, out: Any, inner: Any, folded: Any,
                     before: dict[int, Any]) -> Any:
        rule_carry, total = carry
        index, record = before[id(learner.running_index)], record_of(out)
        if folded is None:
            inner, folded = rule.fold_window(
                rule_carry, with_every_step(out['loss'], record), index)
        grads, rule_carry = rule.close(rule_carry, inner, {**record, **folded}, weight_vals, index)
        total = {name: jax.tree.map(lambda a, b: a + b.astype(a.dtype), total[name], grads[path])
                 for name, path in names.items()}
        return (rule_carry, total), {'loss': out['loss'], 'aux': out['aux']}

    zeros = {name: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), types[name])
             for name in names}
    carry = rule.initial(), zeros
    if learner._carries_trace or K == xs[1].shape[0]:
        states, carry, sums, stacked = run_windows(program, xs, K, carry, after_window, fold_of)
    else:
        states, carry, sums, stacked = run_windows_back(
            program, xs, K, after_window, carry, fold_of, record=not twice)
    rule_carry, traced = carry
    direct = program.unflatten_sums(sums, {k: v.value for k, v in weights.items()})
    total = {k: jax.tree.map(jnp.add, direct[k], traced[k]) if k in traced and direct[k] is not None
             else traced[k] if k in traced
             else direct[k] if direct[k] is not None
             else jax.tree.map(jnp.zeros_like, v.value)
             for k, v in weights.items()}
    stacked = {k: jax.tree.map(typed, v, program.types[k]) for k, v in stacked.items()}
    return (states, rule_carry if rule.stores else {}, jax.tree.map(typed, total, types),
            stacked['loss'], stacked['aux'])


def evolve(
    learner: Any,
    driver: Any,
    upstream_way: Callable[..., Any],
    sequences: tuple[Any, ...],
    *,
    step_fn: Callable[..., Any] | None = None,
    chunk_size: int | None = None,
    return_outputs: bool = False,
) -> Any:
    """Upstream's ``etrace_evolve``; the trace is rolled once per window, two factors on a GPU."""
    said = functools.partial(_note, learner, 'etrace_evolve', sequences)

    def steps() -> Any:
        return upstream_way(*sequences, step_fn=step_fn, chunk_size=chunk_size,
                            return_outputs=return_outputs)

    def as_upstream(reason: Reason) -> Any:
        said('per-step', reason)
        return steps()

    learner._assert_compiled()
    learner._needs_trace('etrace_evolve(...)')
    _enter(learner, driver)
    length = upstream.sequence_length(sequences)
    if not learner.traceops_plan.windowed or upstream.check_chunk_size(chunk_size) is not None:
        return as_upstream(learner.traceops_plan.reason or reasons.CHUNKS())
    if unjitted(learner):
        return as_upstream(reasons.UNJITTED())
    check_states(learner, driver)
    call = driver if step_fn is None else step_fn

    def step(slices: Any) -> Any:
        out = call(*slices)
        return {'sum': {}, 'record': {}, 'out': out if return_outputs else None}

    def in_windows(rules: Sequence[Any], here: bool) -> Any:
        rule = rules[0]
        program_of = _program(learner, step, (sequences,), rule, lambda _: {})
        weight_vals = {path: st.value for path, st in learner.param_states.items()}
        within = not _is_outside_jit(learner, sequences)

        def run(its: Any) -> Any:
            program = program_of(its)
            K, _ = windows(its, program, length)
            initial = its.initial()
            keeps = within and its.keeps(length * program.record_bytes)

            def after_window(carry: Any, out: Any, *_: Any) -> Any:
                record = learner._recorder.read(out['tape'])
                return its.leave(carry, record, weight_vals), (
                    out['out'], whole(record) if keeps else None)

            states, carry, _, (outputs, record) = run_windows(
                program, (sequences,), K, initial, after_window)
            if its is rule and here:
                said('window', _said(program, K))
            return states, carry, outputs, record
        states, carry, outputs, record = _by_form(rules, run, sequences)
        program, before = program_of(rule), rule.initial().get('trace')
        program.store(states)
        rule.store(carry)
        if record is not None:
            learner._warm_up.keep(carry['trace'], weight_vals, record, before)
        return jax.tree.map(typed, outputs, program.types['out']) if return_outputs else None
    return windows_or_steps(_rules(learner, driver), length, in_windows, steps, said,
                            _is_outside_jit(learner, sequences), learns=False)


@contextlib.contextmanager
def _recording(learner: Any) -> Iterator[None]:
    learner._recorder.active, learner._recorder.several_steps = True, False
    try:
        yield
    finally:
        learner._recorder.active = False


def _rules(learner: Any, driver: Any) -> list[Any]:
    """The rule in each form that the program may have, the one for here first."""
    return [make_rule(learner, driver is not learner, together)
            for together in forms_of(learner.traceops_settings)]


def _by_form(rules: Sequence[Any], run: Callable[[Any], Any], sequences: Any) -> Any:
    """``run`` by the rule in the form of the platform that the program is lowered for."""
    learner, of = rules[0].learner, {rule.at_once: rule for rule in rules}

    def in_its_form() -> Any:
        if len(rules) == 1:
            return run(rules[0])
        return by_form(learner.traceops_settings, lambda together: run(of[together]))

    if _is_outside_jit(learner, sequences):
        return learner._programs.call(in_its_form)
    return in_its_form()


def _names_of(learner: Any, weights: Any, paths: Any) -> dict[Any, Any]:
    """``{name in weights: path in the learner}`` of the parameters with a trace."""
    by_id = {id(learner.param_states[p]): p for p in paths}
    return {name: by_id[id(st)] for name, st in weights.items() if id(st) in by_id}
