# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``python -m traceops.benchmarks.repeats``: what kernels have to show on a device.

Bit for bit the same in every run, for there are no atomics in them, and a race would show; the
simulation of a window the same as XLA's loop where no neuron is so close to its threshold that
rounding decides; and how it compares with the loop over rates and sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.benchmarks import operations, tune
from traceops.benchmarks.device_time import microseconds
from traceops.benchmarks.simulations import alone
from traceops.ops.simulate_window import Simulation
from traceops.ops.simulation_trial import drawn

__all__ = ['Finding', 'against_the_loop', 'calls', 'main', 'over_rates', 'same_every_time']

#: How far from its threshold every neuron has to be, at every step; and seeds that are tried.
_MARGIN, _SEEDS = 1e-5, 50
_TOLERANCE = 1e-5
RATES, SIZES = (0., .01, .05, .1, .2, .5, 1.), (128, 512, 1024, 2048, 4096, 8192)


@dataclasses.dataclass(frozen=True)
class Finding:
    """Of one kernel; ``passed`` is whether it may be used."""

    name: str
    passed: bool
    said: str

    def __str__(self) -> str:
        return f'{"ok" if self.passed else "FAILED":6} {self.name}: {self.said}'


def calls(**sizes: int) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Every kernel by name, a function of its operands, and operands.

    ``sizes``: of :func:`traceops.benchmarks.operations.cases`.
    """
    for case in operations.cases(**sizes):
        yield case.name, functools.partial(case.call, backend='triton'), case.operands
    N, B, T = sizes.get('N', 256), sizes.get('B', 32), sizes.get('T', 50)
    for name, simulation in _layers(N, B, T):
        yield name, alone(simulation, 'triton'), _operands(simulation, 0)


def _layers(N: int, B: int, T: int) -> Iterator[tuple[str, Simulation]]:
    """A layer that spikes; one that is gated, of a size whose weights stay in the cache."""
    for kind, n in (('events', N), ('all rows', min(N, 128))):
        for simulation in tune.standard(T, {kind: ((n,), (B,))}):
            yield f'simulate_window {kind}, {n} neurons, {B} samples', simulation


def _operands(simulation: Simulation, seed: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(drawn(rng, a.shape, a.dtype)) for a in simulation.operands)


def same_every_time(name: str, call: Callable[..., Any], operands: Iterable[Any],
                    runs: int) -> Finding:
    """Runs of one program on the same operands, compared bit for bit."""
    given = [jnp.asarray(a) for a in operands]
    program = jax.jit(call)
    first = jax.tree.leaves(program(*given))
    differ = sum(not bool(_same(first, jax.tree.leaves(program(*given))))
                 for _ in range(runs - 1))
    return Finding(name, not differ, f'{runs} runs, ' + (
        f'{differ} differ from the first' if differ else 'the same bits'))


@jax.jit
def _same(first: Any, second: Any) -> Any:
    bits = [[jax.lax.bitcast_convert_type(a, f'uint{8 * a.dtype.itemsize}') for a in leaves]
            for leaves in (first, second)]
    return jnp.all(jnp.stack([jnp.all(a == b) for a, b in zip(*bits, strict=True)]))


def against_the_loop(name: str, simulation: Simulation) -> Finding:
    """The kernel and XLA's loop, of a net in which no neuron is close to its threshold."""
    spiking = 'events' in name
    for seed in range(_SEEDS):
        operands = _operands(simulation, seed)
        want = [np.asarray(a) for a in alone(simulation, 'jax')(*operands)]
        far = float(np.abs(want[-1] - 1.).min()) if spiking else np.inf
        if far > _MARGIN:
            break
    else:
        return Finding(name, False, f'of {_SEEDS} seeds each has a neuron within {_MARGIN:.0e} of '
                                    'its threshold: take fewer neurons')
    got = [np.asarray(a) for a in alone(simulation, 'triton')(*operands)]
    worst = max(float(np.linalg.norm(a - b) / np.linalg.norm(b))
                for a, b in zip(got, want, strict=True))
    fired = float((want[-1] >= 1.).mean()) if spiking else 1.
    return Finding(name, worst <= _TOLERANCE and fired > 0., f'difference {worst:.1e}' + (
        f', margin {far:.1e}, {100 * fired:.1f} % fire' if spiking else ''))


def over_rates(N: int, rate: float, B: int = 32, T: int = 50, repeats: int = 10) -> str:
    """Microseconds of kernel and loop where that part of the neurons fires at every step."""
    rng = np.random.default_rng(0)
    drive = jnp.asarray(2. * (rng.random((T, B, N)) < rate), jnp.float32)
    weights = jnp.asarray(1e-6 * rng.standard_normal((N, N)), jnp.float32)

    def step(constants: Any, slices: Any, states: Any) -> Any:
        (W,), (x,), (V,) = constants, slices, states
        return [x + (V >= 1.).astype(V.dtype) @ W], [V]

    simulation = Simulation(step, [weights], [drive], [drive[0]])
    times = [microseconds(alone(simulation, backend), tuple(simulation.operands), repeats)
             for backend in ('triton', 'jax')]
    if None in times:
        return f'{N} neurons, {100 * rate:g} %: the GPU keeps no record of its kernels here'
    return f'{N} neurons, {100 * rate:g} % fire: kernel {times[0]:.1f} us, loop {times[1]:.1f} us'


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where a kernel failed."""
    parser = argparse.ArgumentParser(prog='python -m traceops.benchmarks.repeats',
                                     description='What kernels have to show on a GPU.')
    parser.add_argument('what', choices=('bits', 'margins', 'rates'))
    parser.add_argument('--runs', type=int, default=1000, help='of each kernel (default: 1000)')
    parser.add_argument('--size', type=int, default=256, help='neurons (default: 256)')
    args = parser.parse_args(argv)
    if args.what != 'rates':        # else the loop's products are in tf32
        jax.config.update('jax_default_matmul_precision', 'highest')
    passed = True
    if args.what == 'rates':
        for N in SIZES:
            for rate in RATES:
                print(over_rates(N, rate), flush=True)
        return 0
    found = (same_every_time(*call, args.runs) for call in calls(N=args.size)) \
        if args.what == 'bits' else (against_the_loop(name, simulation) for n in (128, args.size)
                                     for name, simulation in _layers(n, 8, 20))
    for one in found:
        print(one, flush=True)
        passed &= one.passed
    return 0 if passed else 1


if __name__ == '__main__':
    raise SystemExit(main())
