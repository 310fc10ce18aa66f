# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse nets: connectomes that are frozen beside what is trained, and sparse weights that are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import brainevent
import brainstate
import braintrace
import jax.numpy as jnp
import numpy as np
import saiunit as u
import scipy.sparse

import traceops
from traceops.benchmarks import report
from traceops.benchmarks.measure import (
    TOLERANCE,
    Training,
    bptt,
    check,
    compiled,
    cross_entropy,
    interleaved,
    jitted,
    online,
    simulation,
)
from traceops.benchmarks.nets import neurons

__all__ = ['FLY', 'SparseCase', 'cases', 'main', 'markdown', 'run']

#: Connections of a neuron of a fly's brain, and the neurons of the one that the field trains.
CONNECTIONS, FLY = 115, 127_400
RANK, N_IN, N_OUT = 20, 60, 4
#: A spiking net that hardly spikes proves nothing: spikes a neuron and step, at least.
SILENT = 1e-3


@dataclasses.dataclass(frozen=True)
class SparseCase:
    """One row.

    ``net``: ``'fly'`` (frozen synapses, a trained part of rank 20), ``'trained'`` (synapses) or
    ``'element-wise'`` (frozen synapses, a trained gain of each neuron). ``share``: of all pairs
    of neurons, those that are connected. Bars: ``ratio``, upstream / traceops at least;
    ``learning``, learning / forward at most; ``budget``: whether temporary memory is to stay
    within ``memory_budget``. The first call is not to take longer than upstream's, anywhere.
    ``others``: whether upstream and BPTT are run too (their program of 4 million synapses takes ten
    minutes to compile; gradients are then compared with those of windows of another length).
    ``compiles``: programs that are compiled for its time.
    """

    name: str
    net: str
    rule: str
    n: int
    share: float
    ratio: float | None = None
    learning: float | None = None
    budget: bool = False
    others: bool = True
    compiles: int = 3
    carry: bool = True
    batch: int = 8
    steps: int = 50
    vmap: bool = False


def _fly(n: int) -> SparseCase:
    return SparseCase(
        f'fly of {n:,} neurons, LoRA, ES-D-RTRL', 'fly', 'ES_D_RTRL', n, min(0.1, CONNECTIONS / n),
        3. if n >= FLY else None, 1.25, batch=4, steps=10, vmap=True)


def cases(sizes: Sequence[int] = (10_000,)) -> tuple[SparseCase, ...]:
    """The rows, with flies of so many neurons."""
    es, d, trained = 'ES_D_RTRL', 'D_RTRL', 'trained'
    return (
        *map(_fly, sizes),
        SparseCase('trained, N = 1,000, 10 %, ES-D-RTRL', trained, es, 1000, 0.1, 2.),
        SparseCase('trained, N = 5,000, 2 %, ES-D-RTRL', trained, es, 5000, 0.02, 3., compiles=1),
        SparseCase('trained, N = 1,000, 2 %, D-RTRL', trained, d, 1000, 0.02, 4.),
        SparseCase('trained, N = 1,000, 2 %, D-RTRL, not carried', trained, d, 1000, 0.02, 8.,
                   carry=False),
        SparseCase('trained, N = 20,000, 1 %, ES-D-RTRL', trained, es, 20_000, 0.01, budget=True,
                   others=False, compiles=1),
        # upstream's step is taken: as fast, to the noise of a short benchmark
        SparseCase('frozen, element-wise trained, N = 10,000, D-RTRL', 'element-wise', d, 10_000,
                   CONNECTIONS / 10_000, 0.95),
    )


class Net(brainstate.nn.Module):
    """Input lines -> LIF neurons joined by synapses -> a leaky readout."""

    def __init__(self, case: SparseCase) -> None:
        super().__init__()
        n, rng = case.n, np.random.default_rng(0)
        self.net, matrix = case.net, _synapses(n, case.share, rng)
        self.senses = jnp.asarray(rng.random((N_IN, n)) < 0.05, jnp.float32)
        self.synapses = brainevent.CSR(matrix, shape=(n, n))
        # brainevent keeps arrays that it makes at the first product: not while jax traces
        brainevent.BinaryArray(jnp.zeros(n)) @ self.synapses
        if case.net == 'trained':
            self.recurrent = braintrace.nn.SparseLinear(self.synapses)
        elif case.net == 'fly':
            self.low_rank = braintrace.nn.LoRA(n, RANK, n)
        else:
            self.gain = brainstate.ParamState(jnp.asarray(rng.uniform(0.5, 1.5, n), jnp.float32))
        self.neuron = neurons(n)
        self.readout = braintrace.nn.LeakyRateReadout(n, N_OUT, tau=20. * u.ms)

    def update(self, x: Any) -> Any:
        spikes = self.neuron.get_spike()
        if self.net == 'trained':
            told = self.recurrent(spikes)
        else:
            told = brainevent.BinaryArray(spikes) @ self.synapses
            told = told + self.low_rank(spikes) if self.net == 'fly' else (
                braintrace.element_wise(self.gain.value) * told)
        self.neuron((x @ self.senses + told) * u.mA)
        return self.readout(self.neuron.get_spike())


def _synapses(n: int, share: float, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Data, indices and starts of rows: as many that excite as inhibit, rows in order."""
    pre, post = rng.integers(n, size=(2, round(n * n * share)))
    data = rng.normal(0., 12. / (n * share) ** 0.5, pre.size)
    matrix = scipy.sparse.csr_array((data, (pre, post)), shape=(n, n))
    matrix.sort_indices()
    return (jnp.asarray(matrix.data, jnp.float32), jnp.asarray(matrix.indices, jnp.int32),
            jnp.asarray(matrix.indptr, jnp.int32))


def _training(case: SparseCase) -> Training:
    """Of the same net and the same trials, every time."""
    brainstate.random.seed(0)
    rng = np.random.default_rng(1)
    x = 3. * (rng.random((case.steps, case.batch, N_IN)) < 0.2)
    options: dict[str, Any] = {'batch_size': case.batch, 'vmap': case.vmap}
    if case.rule == 'ES_D_RTRL':
        options['decay_or_rank'] = 0.9
    return Training(Net(case), case.rule, jnp.asarray(x, jnp.float32), cross_entropy,
                    jnp.asarray(rng.integers(N_OUT, size=case.batch)), options)


def _rate(train: Training) -> float:
    """Spikes a neuron and step."""
    def call(x: Any, y: Any) -> Any:
        def step(i: Any) -> Any:
            train.model(i)
            return train.model.neuron.get_spike().mean()
        return brainstate.transform.for_loop(step, x).mean()
    brainstate.nn.init_all_states(train.model, batch_size=train.options['batch_size'])
    return float(jitted(call)(train.inputs, train.targets))


def run(case: SparseCase, repeats: int, progress: bool = True) -> dict[str, Any]:
    """Gradients, then first calls, memory and times."""
    brainstate.environ.set(dt=1. * u.ms)
    train = _training(case)
    args = train.inputs, train.targets
    out: dict[str, Any] = {**dataclasses.asdict(case), 'error': '', 'seconds': {},
                           'spikes': _rate(train), 'temporaries': {}, 'difference': None,
                           'memory_budget': traceops.settings().budget(together=False)}
    if out['spikes'] < SILENT:
        out['error'] = f'the net does not spike ({out["spikes"]:.1e} a neuron and step)'
        return out
    settings = {} if case.carry else {'carry_trace': False}
    makers: dict[str, Callable[[Training], Callable[..., Any]]] = {
        'upstream': lambda t: online(t, braintrace.compile),
        'traceops': lambda t: online(t, traceops.compile, **settings),
        'bptt': bptt, 'forward': simulation}
    fns = {name: make(_training(case)) for name, make in makers.items()
           if case.others or name in ('traceops', 'forward')}
    judged = [name for name in ('upstream', 'traceops') if name in fns]
    programs = {name: jitted(fn) for name, fn in fns.items()}
    # without upstream, against windows of other steps: what they pass on would be wrong in one
    known = programs[judged[0]] if case.others else jitted(online(
        _training(case), traceops.compile, **settings, window=case.steps // 3))
    out['difference'] = check(*(one(*args)[0] for one in (known, programs['traceops'])))
    del known
    if not out['difference'] <= TOLERANCE:
        out['error'] = f'gradients differ by {out["difference"]:.1e} (limit {TOLERANCE:.0e})'
        return out
    alone: dict[str, list[float]] = {name: [] for name in judged}
    for name in judged * case.compiles:      # what is imported and kept has been by now
        seconds, program = compiled(fns[name], *args)
        alone[name].append(seconds)
        out['temporaries'][name] = program.memory_analysis().temp_size_in_bytes
    times = interleaved(programs, args, repeats, case.name if progress else None)
    out['seconds'] = {name: float(np.median(t)) for name, t in times.items()}
    out['first_call'] = {name: float(np.median(alone[name])) + out['seconds'][name]
                         for name in judged}
    return out


HEAD = ('net', 'upstream ms', 'traceops ms', 'BPTT ms', 'forward ms', 'upstream / traceops',
        'learning / forward', 'first call, of upstream\'s', 'temporaries MiB: upstream, traceops',
        'gradients differ by')


def _against(above: float | None, below: float | None, bar: float | None,
             limit: bool = False) -> str:
    if above is None or below is None:
        return '-'
    value = above / below
    if bar is None:
        return f'{value:.2f}'
    met = value <= bar if limit else value >= bar
    return f'{value:.2f} ({"met" if met else "MISSED"}{" at most" * limit} {bar:g})'


def cells(f: dict[str, Any]) -> list[str]:
    if f['error']:
        return [f['name'], f'REFUSED: {f["error"]}', *[''] * (len(HEAD) - 2)]
    t, first = f['seconds'], f['first_call']
    used, mib = f['temporaries'], 2 ** 20
    ours = _against(used['traceops'], mib, f['memory_budget'] / mib if f['budget'] else None, True)
    return [f['name'], *(f'{t[who] * 1e3:.1f}' if who in t else '-' for who in (
                'upstream', 'traceops', 'bptt', 'forward')),
            _against(t.get('upstream'), t['traceops'], f['ratio']),
            _against(t['traceops'], t['forward'], f['learning'], True),
            _against(first['traceops'], first.get('upstream'), 1., True),
            f'{_against(used.get("upstream"), mib, None)}, {ours}',
            '-' if f['difference'] is None else f'{f["difference"]:.1e}']


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for a page."""
    return report.markdown(rows, HEAD, cells)


def main(chosen: list[SparseCase], repeats: int) -> list[dict[str, Any]]:
    """Measure, print the table, return the figures."""
    return report.each(chosen, lambda case: run(case, repeats), HEAD, cells)
