# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Fast learners: braintrace's classes, whose steps can be recorded instead of traced."""

from __future__ import annotations

from typing import Any

import braintrace
import jax

from traceops import config
from traceops.errors import TraceNotCarriedError
from traceops.host import upstream
from traceops.host.drive import evolve, gradient
from traceops.host.plan import Plan, make_plan
from traceops.host.recorder import Recorder
from traceops.host.steps import Steps, unwatched

__all__ = ['D_RTRL', 'ES_D_RTRL', 'FastLearner', 'FastVmap', 'fast_class', 'is_fast']


class FastLearner:
    """Mixed in before a braintrace learner class; everything not overridden is upstream's."""

    _traceops_mixin = True
    traceops_settings: config.Settings
    traceops_plan: Plan | None = None
    _recorder: Recorder | None = None
    _steps: Steps | None = None
    _fresh: tuple[Any, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._become_fast()

    def _become_fast(self) -> None:
        """Keep the settings in force, and Jacobian rows apart."""
        self.traceops_settings = config.settings()
        executor: Any = self.graph_executor  # type: ignore[attr-defined]
        executor.__class__ = upstream.recording_executor(type(executor))

    # -- states ----------------------------------------------------------------------------

    def init_etrace_state(self, *args: Any, **kwargs: Any) -> None:
        """Allocate the trace (unless it is not carried) and the recorder."""
        self.traceops_plan = make_plan(self)
        if self._carries_trace:
            super().init_etrace_state(*args, **kwargs)  # type: ignore[misc]
        else:
            self.etrace_bwg: dict[Any, Any] = {}
            self._trace_filters: dict[Any, Any] = {}
            upstream.VjpAlgorithm.init_etrace_state(self, *args, **kwargs)
        if self.traceops_plan.windowed:
            self._recorder = Recorder(self)
            # where brainstate's graph sees them, so that a Vmap made around the learner maps them
            self.traceops_record = self._recorder.states
            self._steps = self._make_steps()
        self._note_fresh()

    def reset_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Zero the trace, as upstream does."""
        super().reset_state(batch_size, **kwargs)  # type: ignore[misc]
        if self._recorder is not None:
            self._recorder.resize(batch_size)
        self._note_fresh()

    def _note_fresh(self) -> None:
        self._fresh = tuple(jax.tree.leaves(self._trace_values()))

    def _trace_values(self) -> Any:
        return [state.value for name in ('etrace_bwg', '_trace_filters', 'etrace_xs', 'etrace_dfs')
                for state in getattr(self, name, {}).values()]

    def _trace_is_fresh(self) -> bool:
        """Whether the trace is the very zeros it was initialised with (so: known to be zero)."""
        now = jax.tree.leaves(self._trace_values())
        return len(now) == len(self._fresh) and all(
            a is b for a, b in zip(now, self._fresh, strict=True))

    @property
    def _carries_trace(self) -> bool:
        plan = self.traceops_plan
        return (self.traceops_settings.carry_trace or plan is None or not plan.windowed
                or not isinstance(self, upstream.ParamDimVjpAlgorithm))

    def get_etrace_of(self, weight: Any) -> Any:
        """The trace of a weight, as upstream gives it."""
        if not self._carries_trace:
            raise _not_carried('get_etrace_of(weight)')
        return super().get_etrace_of(weight)  # type: ignore[misc]

    # -- one step --------------------------------------------------------------------------

    def _make_steps(self) -> Steps:
        upstreams: Any = super()
        return Steps(self, upstreams._update_etrace_data, upstreams._solve_weight_gradients,
                     getattr(upstreams, '_solve_previous_trace_gradients', None))

    @property
    def _recording(self) -> bool:
        return self._recorder is not None and self._recorder.active

    def _get_etrace_data(self) -> Any:
        if self._recording:
            return {k: p.value for k, p in self._recorder.ports.items()}  # type: ignore[union-attr]
        return super()._get_etrace_data() if self._carries_trace else {}  # type: ignore[misc]

    def _assign_etrace_data(self, values: Any) -> None:
        if self._recording:
            self._recorder.write(values)  # type: ignore[union-attr]
        elif self._carries_trace:
            super()._assign_etrace_data(values)  # type: ignore[misc]

    def _make_etrace_stepper(self, weight_vals: Any) -> Any:
        if self._recording or not self._carries_trace:
            return None
        return super()._make_etrace_stepper(weight_vals)  # type: ignore[misc]

    def _update_etrace_data(self, index: Any, trace: Any, h2w: Any, h2h: Any,
                            weight_vals: Any, multi_step: bool) -> Any:
        if self._recording:
            return self._recorder.record(h2w, h2h, multi_step)  # type: ignore[union-attr]
        if not self._carries_trace:
            return {}
        if self._steps is not None and not multi_step:
            return self._steps.update(trace, h2w, h2h, weight_vals)
        return super()._update_etrace_data(  # type: ignore[misc]
            index, trace, h2w, h2h, weight_vals, multi_step)

    def _solve_weight_gradients(self, index: Any, trace: Any, signal: Any, weight_vals: Any,
                                plain: Any, within: Any) -> Any:
        grads: dict[Any, Any] = dict.fromkeys(self.param_states)  # type: ignore[attr-defined]
        before = upstream.pairs_with_the_step_before(self)
        if self._recording:
            self._recorder.take_signal(signal, before)  # type: ignore[union-attr]
        elif self._steps is not None:
            take = self._steps.previous if before else self._steps.gradient
            grads.update(take(index, trace, signal, weight_vals))
        else:
            return super()._solve_weight_gradients(  # type: ignore[misc]
                index, trace, signal, weight_vals, plain, within)
        for more in (plain, within or {}):
            for path, value in more.items():
                upstream.add_gradient(grads, path, value)
        return grads

    def _solve_previous_trace_gradients(self, index: Any, trace: Any, signal: Any,
                                        weight_vals: Any) -> Any:
        if self._recording:
            self._recorder.take_bypass(signal)  # type: ignore[union-attr]
            return {}
        if self._steps is not None:
            return self._steps.previous(index, trace, signal, weight_vals)
        return super()._solve_previous_trace_gradients(  # type: ignore[misc]
            index, trace, signal, weight_vals)

    def _update_fn_fwd(self, *args: Any) -> Any:
        if not self._recording and not self._carries_trace:     # before any state is touched
            raise _not_carried('a gradient through a single learner(x)')
        return super()._update_fn_fwd(*args)  # type: ignore[misc]

    def _update_fn_bwd(self, residuals: Any, cotangents: Any) -> Any:
        out = super()._update_fn_bwd(residuals, cotangents)  # type: ignore[misc]
        if not self._recording:
            return out
        return (*out[:4], self._recorder.given_signals(), *out[5:])  # type: ignore[union-attr]

    # -- sequences -------------------------------------------------------------------------

    def etrace_grad(self, *sequences: Any, step_fn: Any, **options: Any) -> Any:
        """``braintrace``'s ``etrace_grad``, a window at a time (same arguments and results)."""
        upstream_way = super().etrace_grad  # type: ignore[misc]
        with unwatched():
            return gradient(self, self, upstream_way, sequences, step_fn, **options)

    def etrace_evolve(self, *sequences: Any, **options: Any) -> Any:
        """``braintrace``'s ``etrace_evolve``, a window at a time (same arguments and results)."""
        with unwatched():
            return evolve(self, self, super().etrace_evolve, sequences, **options)  # type: ignore[misc]


class FastVmap(braintrace.ETraceVmap):
    """:class:`braintrace.ETraceVmap` over a fast learner."""

    _traceops_mixin = True

    def etrace_grad(self, *sequences: Any, step_fn: Any, **options: Any) -> Any:
        """``braintrace``'s ``etrace_grad``, a window at a time (same arguments and results)."""
        with unwatched():
            return gradient(self.module, self, super().etrace_grad, sequences, step_fn, **options)

    def etrace_evolve(self, *sequences: Any, **options: Any) -> Any:
        """``braintrace``'s ``etrace_evolve``, a window at a time (same arguments and results)."""
        with unwatched():
            return evolve(self.module, self, super().etrace_evolve, sequences, **options)


def _not_carried(what: str) -> TraceNotCarriedError:
    return TraceNotCarriedError(
        f'{what} needs the eligibility trace, but this learner was made with carry_trace=False, '
        f'which keeps none. Make it with traceops.configure(carry_trace=True), or get gradients '
        f'with learner.etrace_grad(...), which needs no trace.')


_fast_classes: dict[type, type] = {}


def is_fast(learner: Any) -> bool:
    """Whether a learner (or its vmapped wrapper) is one of traceops'."""
    return isinstance(learner, (FastLearner, FastVmap))


def fast_class(cls: type) -> type | None:
    """The fast subclass of a braintrace learner class (None: its engine has no fast path)."""
    if issubclass(cls, FastLearner):
        return cls
    if not issubclass(cls, (upstream.ParamDimVjpAlgorithm, upstream.IODimVjpAlgorithm)):
        return None
    if cls not in _fast_classes:
        make: Any = type(cls)
        _fast_classes.setdefault(cls, make(cls.__name__, (FastLearner, cls), {
            '__module__': cls.__module__, '__qualname__': cls.__qualname__,
            '__doc__': cls.__doc__, '_traceops_mixin': True}))  # one, whichever thread is first
    return _fast_classes[cls]


class D_RTRL(FastLearner, braintrace.D_RTRL):  # noqa: N801  (upstream's name)
    """:class:`braintrace.D_RTRL` on the window engine, without :func:`traceops.install`."""

    _traceops_mixin = True


class ES_D_RTRL(FastLearner, braintrace.ES_D_RTRL):  # noqa: N801
    """:class:`braintrace.ES_D_RTRL` on the window engine, without :func:`traceops.install`."""

    _traceops_mixin = True
