# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``simulate_window``: a step run over a window, in one kernel where a step can be one."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.kernels.simulate_window import launch
from traceops.kernels.simulate_window.anatomy import anatomy
from traceops.kernels.simulate_window.chains import chained
from traceops.kernels.simulate_window.reference import simulate_window as _definition
from traceops.kernels.simulate_window.step import Step, UnsupportedError, trace_step
from traceops.ops import choice
from traceops.ops.primitive import Axes, Operation, bind, define
from traceops.ops.report import why
from traceops.ops.simulation_trial import trial

__all__ = ['SIMULATE_WINDOW', 'Simulation', 'simulate_window']


def _arguments(count: int, step: Step) -> list[str]:
    ends = step.constants, step.constants + step.slices, count
    return [f'{name}[{i}]' for name, n in zip(
        ('constants', 'slices', 'states'), np.diff((0, *ends)), strict=True) for i in range(n)]


def _axes(*operands: Any, step: Step) -> Axes:
    """Samples are ``b0`` and so on; every other axis is needed whole."""
    samples = anatomy(step).samples
    batch = tuple(f'b{i}' for i in range(len(samples)))
    sizes = dict(zip(batch, samples, strict=True))

    def names(mark: str, shape: Sequence[int]) -> tuple[str, ...]:
        first = batch if tuple(shape[:len(batch)]) == samples else ()
        rest = tuple(f'{mark}x{i}' for i in range(len(shape) - len(first)))
        sizes.update(zip(rest, shape[len(first):], strict=True))
        return (*first, *rest)

    constants, slices, states = step.split(operands)
    given = [*(tuple(f'c{i}x{j}' for j in range(a.ndim)) for i, a in enumerate(constants)),
             *(('t', *names(f'x{i}', a.shape[1:])) for i, a in enumerate(slices)),
             *(names(f's{i}', a.shape) for i, a in enumerate(states))]
    after = [names(f's{i}', a.shape) for i, a in enumerate(states)]
    kept = [('t', *names(f'k{i}', v.aval.shape)) for i, v in enumerate(step.kept)]
    used = {n for axes in (*given, *after, *kept) for n in axes}
    return Axes(operands=tuple(given), results=(*after, *kept),
                replicated=frozenset(used - set(batch)), sizes_known=sizes)


def _dtypes(*operands: Any, step: Step) -> list[Any]:
    return [*(v.aval.dtype for v in step.states), *(v.aval.dtype for v in step.kept)]


def _reference(*operands: Any, step: Step) -> tuple[Any, ...]:
    after, kept = _definition(step, *step.split(operands), step.unroll)
    return (*after, *kept)


#: Lanes up to which the automatic choice gives each a launch, where they cannot share one. (By a
#: model a launch of 50 steps takes 30 to 70 us, and a loop of XLA 450 or more.)
FEW = 8


def _batch(operation: Operation, size: int, operands: Sequence[Any], dims: Sequence[int | None],
           request: str, params: dict[str, Any]) -> Any:
    """The mapped axis is one more axis of samples.

    Lanes that have weights of their own cannot share a launch: each has one, where they are few or
    the kernel was asked for, else they share the loop.
    """
    step: Step = params['step']
    constants, slices, states = step.split(operands)
    of_constants, of_slices, of_states = step.split(dims)
    samples = anatomy(step).samples
    of_slices = [1 if d is None and samples and a.shape[1:1 + len(samples)] == samples else d
                 for a, d in zip(slices, of_slices, strict=True)]
    slices = [a if new is None else
              jnp.moveaxis(a, d, 1) if d is not None else
              jnp.broadcast_to(a[:, None], (a.shape[0], size, *a.shape[1:]))
              for a, d, new in zip(slices, step.split(dims)[1], of_slices, strict=True)]
    states = [jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
              for a, d in zip(states, of_states, strict=True)]
    lanes = jax.vmap(step, in_axes=(of_constants, [None if d is None else 0 for d in of_slices],
                                    [0] * len(states)))
    simulation = Simulation(lanes, constants, slices, states, unroll=step.unroll,
                            spike=step.spike, backend=request)

    def together(*_: Any) -> list[Any]:
        after, kept = simulation.run()
        return [*after, *kept]

    def separately(*given: Any) -> list[Any]:
        each = [bind(operation, *(
            a if d is None else jax.lax.index_in_dim(a, i, d, keepdims=False)
            for a, d in zip(given, dims, strict=True)), backend=request, **params)
            for i in range(size)]
        return [jnp.stack(parts, axis) for parts, axis in zip(
            zip(*each, strict=True), places, strict=True)]

    places = [0] * len(states) + [1] * len(step.kept)
    if not simulation.reason or request == 'jax':
        return together(), places
    if request == 'triton':
        return separately(*operands), places
    if size > FEW:
        step.said.append(f'{size} lanes cannot share a launch ({simulation.reason}), and each has '
                         f"one where they are up to {FEW}, or with backend='triton'")
        return together(), places
    return choice.by_platform(*operands, cuda=separately, default=together), places


def _cases() -> list[Any]:
    """A layer that spikes and sends its spikes to itself; a gated one; nothing that is sent."""
    rng = np.random.default_rng(4)
    draw = lambda *shape: np.float32(rng.standard_normal(shape))  # noqa: E731

    def spiking(constants: Any, slices: Any, states: Any) -> Any:
        (W, b), (x,), (V,) = constants, slices, states
        spikes = (V >= 1.).astype(V.dtype)
        V = .9 * (V - spikes) + .1 * (jnp.concatenate([x, spikes], -1) @ W + b)
        return [V], [V]

    def gated(constants: Any, slices: Any, states: Any) -> Any:
        (W,), (x,), (h,) = constants, slices, states
        return [jnp.tanh(x + h @ W)], [h @ W]

    cases = [(spiking, [3. * draw(60, 40), draw(40)], [4. * draw(6, 3, 20)], [draw(3, 40)]),
             (gated, [.2 * draw(36, 36)], [draw(6, 3, 36)], [draw(3, 36)])]
    found = []
    for function, constants, slices, states in cases:
        with jax.default_matmul_precision('highest'):       # on a GPU not the default
            step, operands = trace_step(function, constants, slices, states, 1, '')
        found.append((tuple(operands), {'step': step}))
    return found


SIMULATE_WINDOW = define(Operation(
    name='simulate_window', arguments=_arguments, reference=_reference, axes=_axes,
    dtypes=_dtypes, kernel=launch.plan, batch=_batch, cases=_cases, trial=trial,
    variant=launch.name, measured_as=launch.measured_as,
    shared='devices share the call, and not only its samples perhaps: XLA partitions the loop; '
           'inside jax.shard_map each device has a kernel of its own'))


#: Simulations that are run while somebody watches.
watching: contextvars.ContextVar[list[Simulation] | None] = contextvars.ContextVar(
    'traceops_simulations', default=None)


class Simulation:
    """A step over a window, traced, before it is run; run once, it holds no arrays any more.

    Parameters as of :func:`simulate_window`.

    Attributes
    ----------
    reason : str
        Why the step cannot be a kernel; empty where it can.
    """

    def __init__(self, step: Callable[..., Any], constants: Sequence[Any], slices: Sequence[Any],
                 states: Sequence[Any], *, unroll: int = 1, spike: str = '',
                 backend: str | None = None) -> None:
        given = [[jnp.asarray(a) for a in part] for part in (constants, slices, states)]
        self.request = choice.requested(backend)
        self.reason = ''
        self._loop: Any = functools.partial(_definition, step, *given, unroll)
        self.operands: list[Any] = []
        self.step, self._whole = trace_step(step, *given, unroll, spike)
        self._chained = chained(self.step)
        operands = self._whole
        if self._chained is not None:
            constants, slices, states = self.step.split(operands)
            chains, others = self._chained.split(states)
            before = [jax.ShapeDtypeStruct((slices[0].shape[0], *a.shape), a.dtype)
                      for a in chains]
            self.step, operands = self._chained.step, [*constants, *slices, *before, *others]
        try:
            launch.kernel_of(self.step)
        except UnsupportedError as err:
            self.reason, self._whole = str(err), []
        else:
            self.operands = operands

    def run(self) -> tuple[list[Any], list[Any]]:
        """The states after the window, and what is kept of each step."""
        loop, self._loop = self._loop, None
        if self.reason and self.request == 'triton':
            raise choice.BackendError(
                f"simulate_window: backend='triton' was asked for, but {self.reason}. "
                "Available here: 'jax'. Call simulate_window(..., backend='jax'), or leave the "
                "choice open with backend='auto' (of a learner: traceops.configure("
                "backend='auto')).")
        if self.reason:
            return loop()
        operands, self._whole, self.operands = self._whole, [], [
            jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.operands]
        chains: list[Any] = []
        if self._chained is not None:           # keys and counters come first
            constants, slices, states = self._chained.whole.split(operands)
            chains, others = self._chained.split(states)
            chains, before = _definition(self._chained.advance, constants, slices, chains,
                                         self._chained.whole.unroll)
            operands = [*constants, *slices, *before, *others]
        watched = watching.get()
        if watched is not None:
            watched.append(self)
        out = bind(SIMULATE_WINDOW, *operands, backend=self.request, step=self.step)
        count = len(self.step.states)
        after, kept = list(out[:count]), list(out[count:])
        if self._chained is not None:
            after = self._chained.joined(chains, after)
        return after, kept

    def __str__(self) -> str:
        """How it runs here, and why."""
        if self.reason:
            return f'the loop: {self.reason}'
        try:
            found = why('simulate_window', *self.operands, backend=self.request, step=self.step)
        except choice.BackendError as err:      # the call will say so too
            return str(err)
        if found.backend == 'jax':
            return f'the loop: {found.reason}'
        if self.step.said:
            return f'the loop: {self.step.said[-1]}'
        told = found.reason.partition('kernel, ')[2]
        return f'one kernel ({launch.described(self.step)}' + (
            f'; {told})' if told.startswith('measured') else ')')


def simulate_window(step: Callable[..., Any], constants: Sequence[Any], slices: Sequence[Any],
                    states: Sequence[Any], *, unroll: int = 1, spike: str = '',
                    backend: str | None = None) -> tuple[list[Any], list[Any]]:
    """Run a step over a window: ``jax.lax.scan``, in one kernel where that can be.

    On a GPU a loop launches several kernels a step. A step whose samples never meet, and whose
    neurons meet in products with constant weights alone, is one kernel for all steps.

    Parameters
    ----------
    step : callable
        ``(constants, slices of one step, states) -> (states, what is kept)``, lists of arrays.
    constants : sequence of arrays
        The same at every step; weights ``[I, O]`` of products among them.
    slices : sequence of arrays, ``[T, ...]``
        What is different at each step; at least one.
    states : sequence of arrays, ``[..., N]``
        Before the first step. The leading axes, the same of all, are those of samples; for a
        kernel they are float32.
    unroll : int
        Steps in an iteration of the loop, where it is one.
    spike : str
        Name of a primitive that makes spikes, besides comparisons as numbers.
    backend : {'auto', 'jax', 'triton'}, optional
        Default: ``traceops.settings().backend``.

    Returns
    -------
    states : list of arrays
        After the last step.
    kept : list of arrays, ``[T, ...]``

    Raises
    ------
    BackendError
        ``backend='triton'``, and the step cannot be a kernel, or not here.

    Notes
    -----
    A kernel adds the terms of a product in another order than XLA, so that a neuron close to its
    threshold may spike a step earlier or later. Terms of neurons that send nothing are left out: a
    weight that is infinite or not a number is met when its neuron sends something, not at every
    step.
    """
    return Simulation(step, constants, slices, states, unroll=unroll, spike=spike,
                      backend=backend).run()
