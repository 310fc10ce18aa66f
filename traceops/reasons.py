# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Why a learner, a call or a loop runs as upstream runs it, each with what to write instead.

Every reason that ``explain`` can give is a :class:`Kind` here, so none is without advice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

__all__ = ['Kind', 'Reason', 'instead_of', 'with_advice']

_AS_FAST = "nothing to change: upstream's way is as fast here"
_ASKING = f'{_AS_FAST} (traceops.configure(window=...) asks for windows all the same)'


class Reason(str):
    """A reason in words.

    Attributes
    ----------
    instead : str
        What to write instead, one line.
    """

    instead: str

    def __new__(cls, text: str, instead: str = '') -> Reason:
        one = super().__new__(cls, text)
        one.instead = instead
        return one


def instead_of(reason: str) -> str:
    """What to write instead; empty where nothing was declined."""
    return getattr(reason, 'instead', '')


def with_advice(given: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of ``explain``: pairs of a reason and what to write instead, each once."""
    return [f'- {reason}' + f'\n  instead: {instead}' * bool(instead)
            for reason, instead in dict.fromkeys(given) if reason]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of reason: ``kind(**details)`` is one; texts are formats of the details."""

    text: str
    instead: str

    def __call__(self, **details: Any) -> Reason:
        return Reason(self.text.format(**details), self.instead.format(**details))


# -- of a learner ------------------------------------------------------------------------------

MADE_BEFORE = Kind(
    'made before traceops.install()',
    'call traceops.install() once, before the learner is made; or '
    'traceops.compile(model, rule, example_input, ...)')
MADE_OUTSIDE = Kind(
    'the vmapped wrapper was made outside traceops',
    'traceops.compile(model, rule, example_input, batch_size=B, vmap=True)')
OWN_ENGINE = Kind(
    '{learner} has an engine of its own',
    'nothing to change, if it is the rule that you want: those on the engines of D_RTRL and '
    'ES_D_RTRL are served')
KAPPA_BEFORE = Kind(
    "vjp_method='multi-step' with a kappa filter low-passes the trace of the step before",
    "vjp_method='single-step', if its gradient will do (it is another one)")
BOOTSTRAPPED = Kind(
    "learning_signal='bootstrapped' injects a cotangent at the end of each step",
    'nothing to change, if it is the signal that you want: the others are served')
SPARSE_N = Kind(
    "recurrence_scope='sparse_n' widens the trace over neighbouring positions",
    "recurrence_scope='coupled' or 'diagonal', if its gradient will do (it is another one)")
TRACE_DTYPE = Kind(
    'trace_dtype={dtype!r} rounds the trace at every step, and the window stores no trace to round',
    'trace_dtype=None; where memory is short and each sequence starts from a zero trace, make the '
    'learner in traceops.configured(carry_trace=False) besides')
OWN_METHOD = Kind(
    'this learner has a {name} of its own',
    'leave {name} as the class has it, and do before or after etrace_grad(...) what it does; '
    'else nothing: it is yours, and is kept')
OVERRIDES = Kind(
    '{owner} overrides {name}',
    'a subclass that leaves {name} alone, and does before or after etrace_grad(...) what it does; '
    'else nothing: it is yours, and is kept')
SCAN_INSIDE = Kind(
    'a relation or hidden state lives inside a scan of the model (scan descent)',
    'write the steps of that scan out in update() with a Python loop; or give the learner one '
    'inner step a call')
STATE_DTYPE = Kind(
    'hidden state {path} is {before} and a step leaves it as {after}',
    'make the state as {after}, or end update() with state.value = new.astype({before!r})')
NO_OP = Kind(
    'no parameter is routed through an ETP op',
    'use layers of braintrace.nn, or braintrace.matmul(x, weight) and its like, for the weights '
    'that are to be trained')
SHARED_AXIS = Kind(
    '`{parameter}`: {equation!r} shares axis {shared!r}, so its trace keeps one slot for many '
    'positions, which has no adjoint',
    'braintrace.ES_D_RTRL, which is served, if its gradient will do; or weights with an axis '
    '{shared!r} of their own')
MIXED = Kind(
    "`{parameter}`: {key}_fn acts neither on each weight alone nor on those of each output, and "
    "upstream's trace follows each weight's own output",
    'braintrace.ES_D_RTRL, which is served, if its gradient will do; or a transform of each weight '
    'by itself, or of the weights of each output')
POSITIONS = Kind(
    '`{parameter}`: {op} writes {y_shape} into a hidden group of shape {group}',
    'give the output of the op the shape of the hidden state that it feeds')
NO_CLOSED_FORM = Kind(
    '`{parameter}` {cause}: there is no closed form of its trace over a window, so a trace '
    'that something reads takes a pass a step',
    'where each sequence starts from a zero trace, one etrace_grad over all of it, with mask 0 for '
    'steps without a loss, and traceops.configured(carry_trace=False) around making the learner: '
    'the gradients are the same, and there is no trace. Where calls go on from the trace of the '
    'call before, there is nothing to change')

# -- of a call ---------------------------------------------------------------------------------

BY_HAND = Kind(
    'a single step, taken as it is written',
    'learner.etrace_grad(xs, ys, step_fn=...) for many steps in a row, or a '
    'brainstate.transform.scan whose body adds the gradients up; where weights change at every '
    'step, nothing: it is as fast as upstream')
CHUNKS = Kind(
    'chunk_size asks for upstream windows',
    'leave chunk_size out, if single steps will do (gradients within a chunk are exact, and '
    'differ); traceops.configure(window=...) is the setting for memory')
UNJITTED = Kind(
    'jax.disable_jit() asks for the steps as Python takes them, one by one',
    'leave jax.disable_jit() for windows')
EFFECT = Kind(
    '`{name}` has an effect that only the original loop can have',
    'take `{name}` out of the step: return the value (has_aux=True), and use it after the call; '
    'jax.debug.print and callbacks may stay')
CARRY_TYPE = Kind(
    'a state enters a step as {before} and leaves it as {after}',
    'keep its type: initialise it as the step leaves it, or cast it back at the end of update()')
SUM_TYPE = Kind(
    'what is added up changes its type in the loop: {error}',
    'one dtype for weights, states and inputs: cast what differs to that of the weights')
SEVERAL_STEPS = Kind(
    'the learner is given several steps at once (MultiStepData)',
    'give it single steps, of xs [T, ...], if their gradient will do (it is another one)')
NOT_COUNTED = Kind(
    'step_fn calls the learner inside an inner jit, scan or branch, where its calls cannot be '
    'counted',
    'call learner(x) in step_fn itself; in the place of a branch, multiply the loss by 0 or give '
    'the step a mask of 0')
CALLS = Kind(
    'step_fn calls the learner {count} times a step; the window needs exactly one call',
    'one learner(x) in step_fn; what takes several, as steps of their own: xs with a step for each '
    'call, and a mask of 0 where the loss does not count')
NO_TRACE = Kind(
    'no trace of the size of the weights is rolled',
    "nothing to change: upstream's way costs what simulating costs")
FEW_STEPS = Kind(
    "a sequence of {steps} steps: upstream's step is as fast for one, and for less than {short} of "
    'a small net', _ASKING)
LARGE_BATCH = Kind(
    'a batch so large that a step has {record:.0f} KiB to record, and the weights are '
    "{weights:.0f} KiB: upstream's step is as fast", _ASKING)
SMALL_TRACE = Kind(
    "a sequence of {steps} steps and a trace of {size:.0f} KiB: upstream's step is as fast",
    _ASKING)
LARGE_RECORD = Kind(
    'a trace of {size:.0f} KiB, and a step has {record:.0f} KiB to record: upstream\'s step is as '
    'fast', _ASKING)
ONE_STEP = Kind(
    "a sequence of one step: upstream's fused update passes over the trace once", _AS_FAST)

# -- of a loop written by hand -------------------------------------------------------------------

_AFTER = ('do it with the sum, after the loop, if that is what you mean (a norm, clipping, an '
          "update); where it has to be done at every step, nothing: upstream's way is as fast")
_ADD_UP = 'add the gradients up in the carry: total = jax.tree.map(jnp.add, total, grads)'
_TRACE = 'reset before the loop, and read the trace after it: learner.get_etrace_of(weight)'

LOOP_OF_ONE = Kind('a loop of one step', _AS_FAST)
INSIDE = Kind(
    'its step is inside a `{name}`',
    'call learner(x) in the body of the scan itself; in the place of a branch, multiply the loss '
    'by 0; in the place of a `while`, a scan over a fixed number of steps')
LOOP_EFFECT = Kind(
    "`{name}` has an effect that is the original loop's alone",
    'take `{name}` out of the loop: carry the value, or return it; jax.debug.print and callbacks '
    'may stay')
STEPS = Kind(
    'it steps {count} times in one iteration of the loop',
    'one learner(x) in the body of a scan over all steps, whose losses are multiplied by 0 where '
    'they do not count')
SEVERAL_VMAPS = Kind('it runs under several vmaps', 'one vmap over both axes as one batch')
WEIGHTS_IN_LANES = Kind('its weights differ from lane to lane', _AS_FAST)
WEIGHTS_CHANGE = Kind(
    'its weights change in the loop',
    'add the gradients up in the carry and update once after the loop, if that is what you mean; '
    "where each step is to update, nothing: upstream's way is as fast")
NO_SUM = Kind('no gradient is added up in the loop', _ADD_UP)
RETURNED = Kind(
    '{what}: the loop returns it at every step', f'{_ADD_UP}; return the loss')
REPLACED = Kind(
    '{what}: a carry takes its place (nothing is added up)', _ADD_UP)
SUM_READ = Kind('{what}: {by} reads the sum inside the loop', _AFTER)
SUM_SHARED = Kind(
    '{what}: the sum is not of it alone', f'{_ADD_UP}, with nothing else in that carry')
LANE_BY_LANE = Kind(
    '{what}: it is added up lane by lane',
    'take the mean or the sum over lanes in the step, before the gradients are added up')
READ = Kind('{what}: {by} reads it inside the loop', _AFTER)
TRACE_NOT_CARRIED = Kind('its trace is not carried from step to step', _TRACE)
TRACE_RETURNED = Kind('the loop returns its trace at every step', _TRACE)
TRACE_OTHER = Kind('its gradient is taken of another trace', _TRACE)
TRACE_READ = Kind('{by} reads its trace inside the loop', _TRACE)
FILTER_STEPS = Kind(
    'its trace filter advances {count} times a step',
    'one gradient a step, of the sum of the losses')
FILTER_NOT_CARRIED = Kind('its trace filter is not carried from step to step', _TRACE)
UNFORESEEN = Kind(
    '{error}', 'nothing: the loop runs as it is written. Please report this with the message')
