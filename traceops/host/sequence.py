# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A call over a sequence: what is checked, whether its window is worth it and how long it is, and
what the call returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import saiunit as u

from traceops import reasons
from traceops.compiler.program import StepProgram, UnknownEffectError
from traceops.compiler.types import CarryTypeError
from traceops.engine.windows import choose_window
from traceops.host.forms import OfStates
from traceops.host.plan import why_short, why_small
from traceops.reasons import Reason

__all__ = ['NotAStepError', 'check_choice', 'check_states', 'results', 'unjitted',
           'why_not_a_step', 'windows', 'windows_or_steps']


class NotAStepError(Exception):
    """A call of ``step_fn`` is not one step of the learner."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def check_choice(name: str, value: Any, legal: tuple[str, ...]) -> None:
    """An option is one of those that there are."""
    if value not in legal:
        raise ValueError(f'{name} must be one of {legal}, got {value!r}.')


def check_states(learner: Any, driver: Any) -> None:
    """Hidden states still have the shapes that the graph was compiled for."""
    lanes = 0 if driver is learner else 1
    for path, invar in learner.graph.module_info.hidden_path_to_invar.items():
        state = learner.graph.module_info.retrieved_model_states[path]
        now, then = tuple(u.math.shape(state.value)), tuple(invar.aval.shape)
        if now[lanes:] != then:
            raise ValueError(
                f'hidden state {path} has shape {now}, but the learner was compiled for '
                f'{then}{" per lane" if lanes else ""}. Compile the learner again for this '
                f'shape: braintrace.compile(model, rule, example_input, batch_size=...).')


def unjitted(learner: Any) -> bool:
    """Whether each step is to be run as it is written (and there is a trace to run it with)."""
    return bool(jax.config.jax_disable_jit) and learner._carries_trace  # type: ignore[attr-defined]


def windows_or_steps(rules: Sequence[Any], length: int,
                     in_windows: Callable[[Sequence[Any], bool], Any], steps: Callable[[], Any],
                     said: Callable[[str, str], None], outside_jit: bool,
                     learns: bool = True) -> Any:
    """A call in windows, or a step at a time, as upstream takes it; whichever is faster.

    That can differ between the forms that a program may have: it has both ways then, and that of
    the platform is lowered. Outside jit jax's default device decides.

    Parameters
    ----------
    rules : sequence of Rule
        In each form that the program may have, the one for here first.
    length : int
    in_windows : callable
        The results by some of the rules, and whether the first of them is for here; may raise
        what has a reason.
    steps : callable
        The results a step at a time.
    said : callable
        Remembers the engine, and why.
    outside_jit : bool
    learns : bool
        Whether the steps have a gradient.
    """
    rule = rules[0]
    learner, reason = rule.learner, _worth_a_step(rule, length, learns)
    windowed = rules if outside_jit else [
        one for one in rules if not _worth_a_step(one, length, learns)]
    with learner._recorder.detached():
        if 0 < len(windowed) < len(rules):
            with contextlib.suppress(Exception):    # what cannot be both is what it is here
                out = OfStates(steps).by_form(
                    learner.traceops_settings, not windowed[0].at_once,
                    lambda: in_windows(windowed, not reason))
                if reason:
                    said('per-step', reason)
                return out
        if not reason:
            try:
                return in_windows(windowed, True)
            except (UnknownEffectError, CarryTypeError, NotAStepError) as err:
                reason = err.reason
    said('per-step', reason)
    return steps()


def _worth_a_step(rule: Any, length: int, learns: bool) -> Reason | None:
    """Why upstream's step is the faster way, if it is."""
    learner = rule.learner
    if rule.factorised:
        if not (learns or rule.at_once):
            return reasons.NO_TRACE()
        return why_short(learner, rule.lanes, rule.at_once, length)
    if not learner._carries_trace:
        return None
    if length == 1 and rule.initial():
        return reasons.ONE_STEP()
    return why_small(learner, rule.lanes, rule.at_once, length)


def why_not_a_step(learner: Any, program: StepProgram) -> Reason:
    """Why a call of ``step_fn`` is not one step of the learner."""
    count = program.count
    if learner._recorder.several_steps:
        return reasons.SEVERAL_STEPS()
    if count is None:
        return reasons.NOT_COUNTED()
    return reasons.CALLS(count=count)


def windows(rule: Any, program: StepProgram, length: int) -> tuple[int, bool]:
    """Steps per window, and whether windows are simulated twice.

    Windows from the last to the first are, unless what they are recomputed from fits the budget;
    and where a window was asked for, so that memory is that of a window.
    """
    settings = rule.learner.traceops_settings
    if settings.window is not None and settings.window > length:
        raise ValueError(
            f'window={settings.window} is longer than the sequence of {length} steps. Make the '
            f'learner with traceops.configure(window={length}) or less, or window=None to have '
            f'it chosen.')
    # what a step is recomputed from is stored beside its record
    step_bytes = program.record_bytes + program.ahead_bytes + rule.copied_bytes
    fixed = program.fixed_bytes
    K = choose_window(length, step_bytes, settings.window, rule.window_budget(fixed))
    if K == length or rule.learner._carries_trace:
        return K, False
    room = rule.room(fixed)
    left = room - length * program.ahead_bytes
    twice = settings.window is not None or left < room // 2
    budget = room if twice else min(left, rule.window_budget(fixed))
    K = choose_window(length, step_bytes, settings.window, budget)
    return K, twice and K < length


def _steps_counted(mask: Any) -> Any:
    """What a mean is over, as upstream has it."""
    return jnp.maximum(jnp.sum(mask), 1.0)


def results(total: Any, losses: Any, aux: Any, mask: Any, reduction: str, loss_output: str,
            has_aux: bool, return_value: bool) -> Any:
    """What ``etrace_grad`` returns, of gradients and losses that are sums over the steps."""
    if reduction == 'mean':     # not by the weights of the losses: not every signal is linear in it
        total = jax.tree.map(lambda g: g / _steps_counted(mask), total)
    if not return_value:
        return (total, aux) if has_aux else total
    masked = losses * mask
    value = {'per_step': losses, 'masked': masked, 'scalar': jnp.sum(masked)}[loss_output]
    if loss_output == 'scalar' and reduction == 'mean':
        value = value / _steps_counted(mask)
    return (total, value, aux) if has_aux else (total, value)
