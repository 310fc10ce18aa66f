# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops tune``: on a GPU, the simulation of a window as a kernel against XLA's loop.

Each kernel is checked, then both are timed, for layers of standard sizes or for a learner of yours.
What was found is kept in the user's cache directory (:mod:`traceops.ops.measured`), where the
automatic choice reads it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from rich.table import Table
from tqdm import tqdm

import traceops
from traceops.benchmarks.device_time import microseconds
from traceops.benchmarks.simulations import alone, simulations_of
from traceops.cli import factory
from traceops.errors import TraceopsError
from traceops.ops import choice, measured
from traceops.ops.simulate_window import SIMULATE_WINDOW, Simulation
from traceops.ops.simulation_trial import drawn, trial
from traceops.text import render

__all__ = ['SIZES', 'main', 'of_learner', 'standard', 'tried']

#: ``kind of layer -> neurons, samples`` of the table that is measured without a learner.
SIZES = {'events': ((128, 256, 512, 1024, 2048, 4096, 8192), (8, 16, 32, 64, 128)),
         'all rows': ((64, 128, 256, 512), (8, 32, 128))}
_STEPS = 50


class NoGpuError(TraceopsError, RuntimeError):
    """There is nothing to time here."""


def main(argv: list[str] | None = None) -> int:
    """Time, print, keep; exit status 1 where there is no GPU, 2 for a name that is not known."""
    parser = argparse.ArgumentParser(
        prog='traceops tune', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='On a GPU, time the simulation of a window as a kernel against XLA\'s loop,\n'
                    'and keep what was found for the automatic choice.',
        epilog='MODULE:FACTORY returns a compiled learner, as for `traceops explain`.\n'
               'Without it, layers of standard sizes are timed (a quarter of an hour).')
    parser.add_argument('target', nargs='?', metavar='MODULE:FACTORY')
    parser.add_argument('--steps', type=int, default=_STEPS,
                        help=f'of a window (default: {_STEPS})')
    parser.add_argument('--repeats', type=int, default=10,
                        help='calls that are timed (default: 10)')
    args = parser.parse_args(argv)
    make = None if args.target is None else factory(args.target, parser)
    if jax.default_backend() != 'gpu':
        raise NoGpuError(f'tune times kernels on a GPU, and jax runs on {jax.default_backend()}; '
                         'nothing was measured')
    found = standard(args.steps) if make is None else of_learner(make, args.steps)
    kind = choice.cuda_place().kind
    verdicts, rows = {}, []
    for simulation in tqdm([*found], leave=False):
        one = tried(simulation, args.repeats)
        keys = SIMULATE_WINDOW.measured_as(  # type: ignore[misc]
            *simulation.operands, step=simulation.step)
        verdicts[keys[make is None]] = one
        rows.append((keys[make is None], one))
        path = measured.write(kind, verdicts)       # what is interrupted is not lost
    print(table(kind, rows))
    print(f'kept in {path}' if rows else 'nothing of this learner can be a kernel: '
          'traceops.explain says why')
    return 0


def table(kind: str, rows: Iterable[tuple[str, measured.Measured]]) -> str:
    """What was found, and what will be used."""
    out = Table(title=f'simulation of a window on {kind}', title_justify='left')
    for name in ('layer', 'kernel us', 'loop us', 'use', 'check'):
        out.add_column(name, overflow='fold')
    for name, one in rows:
        out.add_row(name, f'{one.kernel:.1f}', f'{one.reference:.1f}',
                    'kernel' if one.backend == 'triton' else 'loop', one.detail)
    return render(out, width=120)


def standard(steps: int = _STEPS, sizes: Any = None) -> Iterator[Simulation]:
    """One recurrent layer of each size (default: :data:`SIZES`): spiking, and gated."""
    sizes = SIZES if sizes is None else sizes

    def spiking(constants: Any, slices: Any, states: Any) -> Any:
        (W,), (x,), (V,) = constants, slices, states
        spikes = (V >= 1.).astype(V.dtype)
        V = .9 * (V - spikes) + x + spikes @ W
        return [V], [V]

    def gated(constants: Any, slices: Any, states: Any) -> Any:
        (W,), (x,), (h,) = constants, slices, states
        return [jax.numpy.tanh(x + h @ W)], [h]

    for kind, step in (('events', spiking), ('all rows', gated)):
        neurons, batches = sizes.get(kind, ((), ()))
        for n in neurons:
            for b in batches:
                shapes = [(n, n)], [(steps, b, n)], [(b, n)]
                yield _simulation(step, *([jax.ShapeDtypeStruct(s, np.float32) for s in part]
                                          for part in shapes))


def _simulation(step: Callable[..., Any], *parts: Any) -> Simulation:
    """A simulation of which the shapes are known; it is not run."""
    made: list[Simulation] = []

    def make(*given: Any) -> Any:
        made.append(Simulation(step, *given))
        return made[0].run()
    jax.eval_shape(make, *parts)
    return made[0]


def of_learner(make: Callable[[], Any], steps: int = _STEPS) -> list[Simulation]:
    """The simulations of a training call of the learner that ``make`` returns."""
    with traceops.enabled(two_phase=True):
        learner = make()
        inputs = [jax.numpy.zeros((steps, *aval.shape), aval.dtype)
                  for aval in _inputs_of(learner)]

        def call(*xs: Any) -> Any:
            return learner.etrace_grad(*xs, step_fn=lambda *x: sum(
                (a ** 2).mean() for a in jax.tree.leaves(learner(*x))))
        return simulations_of(call, *inputs)


def _inputs_of(learner: Any) -> list[Any]:
    """Types of the arguments of a compiled learner's step."""
    if not hasattr(learner, 'graph_executor'):
        raise TraceopsError(f'the factory returned {type(learner).__name__}; return the learner of '
                            'braintrace.compile(model, rule, example_input, batch_size=...)')
    info = learner.graph.module_info
    states = sum(len(jax.tree.leaves(state.value)) for state in info.compiled_model_states)
    avals = list(info.closed_jaxpr.in_avals)
    return avals[:len(avals) - states]


def tried(simulation: Simulation, repeats: int = 10) -> measured.Measured:
    """A kernel checked on this device, and timed against the loop."""
    params, operands = {'step': simulation.step}, simulation.operands
    device = jax.devices()[0]
    try:
        right, detail = trial(SIMULATE_WINDOW, operands, params, device)
    except Exception as err:                        # whatever it is, the kernel is not to be used
        right, detail = False, f'{type(err).__name__}: {str(err).splitlines()[0]}'
    rng = np.random.default_rng(0)
    given = jax.device_put([drawn(rng, a.shape, a.dtype) for a in operands], device)
    times = {backend: _time(simulation, backend, given, repeats)
             for backend in ('triton', 'jax') if right or backend == 'jax'}
    return measured.Measured(times.get('triton', float('inf')), times['jax'], right, detail)


def _time(simulation: Simulation, backend: str, operands: Any, repeats: int) -> float:
    found = microseconds(alone(simulation, backend), tuple(operands), repeats)
    if found is None:
        raise TraceopsError('the GPU keeps no record of its kernels here; nothing was measured')
    return found
