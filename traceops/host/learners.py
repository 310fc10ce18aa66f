# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Fast learners: braintrace's, whose steps can be recorded instead of traced.

A learner's class is left alone: who asks for the type of a learner, pickles it or dispatches on it
gets upstream's answer, or the user's own class. What is done differently are attributes of the one
learner, in the place of methods, and brainstate's graph sees none of them: states, copies and
checkpoints are upstream's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import brainstate
import braintrace
import jax

from traceops import config, memory, reasons
from traceops.compiler.outside_jit import Programs
from traceops.errors import TraceNotCarriedError
from traceops.host import upstream
from traceops.host.drive import evolve, gradient
from traceops.host.plan import make_plan
from traceops.host.recorder import Recorder
from traceops.host.seen import BY_HAND, Calls, is_in_a_loop, note
from traceops.host.steps import Steps, loops_are_watched, unwatched
from traceops.host.warm_up import WarmUp

__all__ = ['D_RTRL', 'ES_D_RTRL', 'is_fast', 'make_fast', 'make_fast_vmap']


class _Instead:
    """Methods of one object that take the place of its class's."""

    methods: tuple[str, ...] = ()
    #: Attributes that the object has besides.
    attributes: tuple[str, ...] = ()

    def __init__(self, one: Any) -> None:
        self.one = one
        names = [name for name in self.methods if hasattr(type(one), name)]
        self.replaced = {name: self._method(name) for name in names}
        vars(one).update(self.replaced, _traceops=self)
        vars(one)['graph_invisible_attrs'] = (
            *type(one).graph_invisible_attrs, 'graph_invisible_attrs', '_traceops', *names,
            *self.attributes)

    def _method(self, name: str) -> Callable[..., Any]:
        method = getattr(self, name)

        @functools.wraps(self.original(name))
        def instead(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)
        return instead

    def original(self, name: str) -> Callable[..., Any]:
        """The method that the class has, bound."""
        method: Callable[..., Any] = inspect.getattr_static(type(self.one), name).__get__(
            self.one, type(self.one))
        return method


class FastLearner(_Instead):
    """What a learner does its own way; everything else is upstream's."""

    methods = ('init_etrace_state', 'reset_state', 'get_etrace_of', '_get_etrace_data',
               '_assign_etrace_data', '_make_etrace_stepper', '_update_etrace_data',
               '_solve_weight_gradients', '_solve_previous_trace_gradients', '_update_impl',
               '_update_fn_bwd', 'etrace_grad', 'etrace_evolve')
    attributes = ('traceops_settings', 'traceops_plan', 'traceops_record', '_recorder', '_steps',
                  '_last_call', '_carries_trace', '_trace_is_fresh', '_calls', '_lanes',
                  '_entered_from_zero', '_needs_trace', '_programs', '_warm_up')

    def __init__(self, learner: Any) -> None:
        super().__init__(learner)
        self.fresh: tuple[Any, ...] = ()
        vars(learner).update(traceops_plan=None, _recorder=None, _steps=None, _last_call=None,
                             _carries_trace=True, _trace_is_fresh=self.trace_is_fresh,
                             _calls=Calls(), _lanes=1, _entered_from_zero=False,
                             _needs_trace=self.needs_trace, _programs=Programs(),
                             _warm_up=WarmUp())

    def begin(self) -> None:
        """Keep the settings in force, and Jacobian rows separate."""
        self.one.traceops_settings = config.settings()
        if self.one.traceops_settings.reuse_memory:
            memory.reuse()
        upstream.keep_rows_separate(self.one.graph_executor)

    # -- states ----------------------------------------------------------------------------

    def init_etrace_state(self, *args: Any, **kwargs: Any) -> None:
        """Allocate the trace (unless it is not carried) and the recorder."""
        learner = self.one
        learner.traceops_plan = plan = make_plan(learner)
        learner._carries_trace = (learner.traceops_settings.carry_trace or not plan.windowed
                                  or not isinstance(learner, upstream.ParamDimVjpAlgorithm))
        if learner._carries_trace:
            self.original('init_etrace_state')(*args, **kwargs)
        else:
            learner.etrace_bwg, learner._trace_filters = {}, {}
            upstream.VjpAlgorithm.init_etrace_state(learner, *args, **kwargs)
        if plan.windowed:
            learner._recorder = Recorder(learner)
            learner.traceops_record = learner._recorder.states
            learner._steps = self._make_steps()
        self._note_fresh()

    def reset_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Zero the trace, as upstream does."""
        self.original('reset_state')(batch_size, **kwargs)
        if self.one._recorder is not None:
            self.one._recorder.resize(batch_size)
        self._note_fresh()

    def _note_fresh(self) -> None:
        self.fresh = tuple(jax.tree.leaves(self._trace_values()))

    def _trace_values(self) -> Any:
        return [state.value for name in ('etrace_bwg', '_trace_filters', 'etrace_xs', 'etrace_dfs')
                for state in getattr(self.one, name, {}).values()]

    def trace_is_fresh(self) -> bool:
        """Whether the trace is the very zeros it was initialised with (so: known to be zero)."""
        now = jax.tree.leaves(self._trace_values())
        return len(now) == len(self.fresh) and all(
            a is b for a, b in zip(now, self.fresh, strict=True))

    def get_etrace_of(self, weight: Any) -> Any:
        """The trace of a weight, as upstream gives it."""
        if not self.one._carries_trace:
            raise _not_carried('get_etrace_of(weight)')
        return self.original('get_etrace_of')(weight)

    # -- one step --------------------------------------------------------------------------

    def _make_steps(self) -> Steps:
        previous = '_solve_previous_trace_gradients'
        return Steps(self.one, self.original('_update_etrace_data'),
                     self.original('_solve_weight_gradients'),
                     self.original(previous) if previous in self.replaced else None)

    @property
    def _recording(self) -> bool:
        return self.one._recorder is not None and self.one._recorder.active

    def _get_etrace_data(self) -> Any:
        if self._recording:
            return {k: p.value for k, p in self.one._recorder.ports.items()}
        return self.original('_get_etrace_data')() if self.one._carries_trace else {}

    def _assign_etrace_data(self, values: Any) -> None:
        if self._recording:
            self.one._recorder.write(values)
        elif self.one._carries_trace:
            self.original('_assign_etrace_data')(values)

    def _make_etrace_stepper(self, weight_vals: Any) -> Any:
        if self._recording or not self.one._carries_trace:
            return None
        return self.original('_make_etrace_stepper')(weight_vals)

    def _update_etrace_data(self, index: Any, trace: Any, h2w: Any, h2h: Any,
                            weight_vals: Any, multi_step: bool) -> Any:
        if self._recording:
            return self.one._recorder.record(h2w, h2h, multi_step)
        if not self.one._carries_trace:
            return {}
        if self.one._steps is not None and not multi_step:
            return self.one._steps.update(trace, h2w, h2h, weight_vals)
        return self.original('_update_etrace_data')(
            index, trace, h2w, h2h, weight_vals, multi_step)

    def _solve_weight_gradients(self, index: Any, trace: Any, signal: Any, weight_vals: Any,
                                plain: Any, within: Any) -> Any:
        grads: dict[Any, Any] = dict.fromkeys(self.one.param_states)
        before = upstream.pairs_with_the_step_before(self.one)
        if self._recording:
            self.one._recorder.take_signal(signal, before)
        elif self.one._steps is not None:
            take = self.one._steps.previous if before else self.one._steps.gradient
            grads.update(take(index, trace, signal, weight_vals))
        else:
            return self.original('_solve_weight_gradients')(
                index, trace, signal, weight_vals, plain, within)
        for more in (plain, within or {}):
            for path, value in more.items():
                upstream.add_gradient(grads, path, value)
        return grads

    def _solve_previous_trace_gradients(self, index: Any, trace: Any, signal: Any,
                                        weight_vals: Any) -> Any:
        if self._recording:
            self.one._recorder.take_bypass(signal)
            return {}
        if self.one._steps is not None:
            return self.one._steps.previous(index, trace, signal, weight_vals)
        return self.original('_solve_previous_trace_gradients')(
            index, trace, signal, weight_vals)

    def _update_impl(self, *args: Any) -> Any:
        if not self._recording:         # before any state is touched
            self.needs_trace('a step by hand, learner(x),')
            if self.one.traceops_plan is not None and loops_are_watched() and not is_in_a_loop():
                several = _steps_at_once(args)
                note(self.one, BY_HAND, several or 1, 'per-step',
                     reasons.SEVERAL_STEPS() if several else reasons.BY_HAND())
        return self.original('_update_impl')(*args)

    def needs_trace(self, what: str) -> None:
        """Refuse what would do without a trace, and give other gradients for it."""
        if not self.one._carries_trace:
            raise _not_carried(what)

    def _update_fn_bwd(self, residuals: Any, cotangents: Any) -> Any:
        out = self.original('_update_fn_bwd')(residuals, cotangents)
        if not self._recording:
            return out
        return (*out[:4], self.one._recorder.given_signals(), *out[5:])

    # -- sequences -------------------------------------------------------------------------

    def etrace_grad(self, *sequences: Any, step_fn: Any, **options: Any) -> Any:
        """``braintrace``'s ``etrace_grad``, a window at a time (same arguments and results)."""
        upstream_way = self.original('etrace_grad')
        with unwatched():
            return gradient(self.one, self.one, upstream_way, sequences, step_fn, **options)

    def etrace_evolve(self, *sequences: Any, **options: Any) -> Any:
        """``braintrace``'s ``etrace_evolve``, a window at a time (same arguments and results)."""
        with unwatched():
            return evolve(self.one, self.one, self.original('etrace_evolve'), sequences, **options)


class FastVmap(_Instead):
    """:class:`braintrace.ETraceVmap` over a fast learner.

    While a step is traced, the wrapper maps what the learner records as it maps all other states:
    with the function of a wrapper that was made where the graph did see them.
    """

    methods = ('etrace_grad', 'etrace_evolve')

    def __init__(self, vmapped: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vmapped)
        learner = vars(vmapped.module)
        hidden = learner['graph_invisible_attrs']
        learner['graph_invisible_attrs'] = tuple(n for n in hidden if n != 'traceops_record')
        try:
            self.recording = brainstate.nn.Vmap(*args, **kwargs).vmapped_fn
        finally:
            learner['graph_invisible_attrs'] = hidden

    @contextlib.contextmanager
    def _in_window(self) -> Iterator[None]:
        usual, self.one.vmapped_fn = self.one.vmapped_fn, self.recording
        try:
            with unwatched():
                yield
        finally:
            self.one.vmapped_fn = usual

    def etrace_grad(self, *sequences: Any, step_fn: Any, **options: Any) -> Any:
        """``braintrace``'s ``etrace_grad``, a window at a time (same arguments and results)."""
        with self._in_window():
            return gradient(self.one.module, self.one, self.original('etrace_grad'), sequences,
                            step_fn, **options)

    def etrace_evolve(self, *sequences: Any, **options: Any) -> Any:
        """``braintrace``'s ``etrace_evolve``, a window at a time (same arguments and results)."""
        with self._in_window():
            return evolve(self.one.module, self.one, self.original('etrace_evolve'), sequences,
                          **options)


def _not_carried(what: str) -> TraceNotCarriedError:
    return TraceNotCarriedError(
        f'{what} needs the eligibility trace, but this learner was made with carry_trace=False, '
        f'which keeps none. Make it with traceops.configure(carry_trace=True); or get gradients '
        f'with learner.etrace_grad(...), which needs no trace (give steps before those that count '
        f'a mask of 0); or call the model itself to look forward only.')


def _steps_at_once(args: Any) -> int:
    """How many steps a call is given as ``MultiStepData``; 0: single steps."""
    several = braintrace.MultiStepData
    return max((len(leaf) for one in jax.tree.leaves(
        args, is_leaf=lambda a: isinstance(a, several)) if isinstance(one, several)
        for leaf in jax.tree.leaves(one.data)), default=0)


def is_fast(one: Any) -> bool:
    """Whether a learner (or its vmapped wrapper) is one of traceops'."""
    return '_traceops' in getattr(one, '__dict__', ())


def make_fast(learner: Any, init: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Construct a learner by ``init``; a fast one, if there is a fast path for its engine."""
    engines = (upstream.ParamDimVjpAlgorithm, upstream.IODimVjpAlgorithm)
    if is_fast(learner) or not isinstance(learner, engines):
        init(*args, **kwargs)
        return
    fast = FastLearner(learner)
    init(*args, **kwargs)
    fast.begin()


def make_fast_vmap(vmapped: Any, init: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Construct a vmapped wrapper by ``init``; a fast one, if it is around a fast learner."""
    init(*args, **kwargs)
    if type(vmapped) is upstream.ETraceVmap and is_fast(getattr(vmapped, 'module', None)):
        FastVmap(vmapped, *args, **kwargs)


class D_RTRL(braintrace.D_RTRL):  # noqa: N801  (upstream's name)
    """:class:`braintrace.D_RTRL` on the window engine, without :func:`traceops.install`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        make_fast(self, super().__init__, *args, **kwargs)


class ES_D_RTRL(braintrace.ES_D_RTRL):  # noqa: N801
    """:class:`braintrace.ES_D_RTRL` on the window engine, without :func:`traceops.install`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        make_fast(self, super().__init__, *args, **kwargs)
