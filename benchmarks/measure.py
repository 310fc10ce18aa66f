# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A row: gradients checked first, then everybody timed, interleaved."""

from __future__ import annotations

import dataclasses
import math
import random
import resource
import time
from typing import Any

import brainstate
import jax
import numpy as np
import saiunit as u
from tqdm import tqdm

from traceops.benchmarks import contestants
from traceops.benchmarks.cases import Case

__all__ = ['Row', 'check', 'run']

#: Largest relative difference of a gradient leaf from upstream's, and of a loss.
TOLERANCE = 1e-5
#: Spikes of a neuron in a sequence below which a net counts as silent.
FEWEST_SPIKES = 0.05


@dataclasses.dataclass
class Row:
    """What was measured of a case; where ``error`` is set, no speed was.

    ``memory`` is that of the compiled call (arguments, results, temporaries), ``peak_rss`` that
    of the process, both in bytes.
    """

    case: Case
    difference: float | None = None
    spikes: float | None = None
    error: str = ''
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    engines: dict[str, str] = dataclasses.field(default_factory=dict)
    upstream_bytes: int | None = None
    peak_rss: int = 0

    def median(self, who: str) -> float | None:
        times = self.seconds.get(who)
        return float(np.median(times)) if times else None

    def ratio(self, above: str, below: str) -> float | None:
        a, b = self.median(above), self.median(below)
        return a / b if a is not None and b is not None else None


def run(case: Case, repeats: int = 5, progress: bool = True, compiles: int = 1,
        patience: float = 3.) -> Row:
    """Check a case, then time it.

    Parameters
    ----------
    case : Case
        The row.
    repeats : int
        Timed calls of each contestant, at least; one that is done sooner gets more of them.
    progress : bool
        Show a progress bar.
    compiles : int
        Times that each call is compiled; the shortest counts.
    patience : float
        Seconds of timed calls of each contestant, about.

    Returns
    -------
    Row
        With ``error`` set, and no times, when a check failed.
    """
    brainstate.environ.set(dt=1. * u.ms)
    row = Row(case)
    data = contestants.data(case)
    try:
        _check_spikes(row)
        if case.check_batch is not None:
            _check_small(row)
        entered, calls = _compiled(row, compiles)
        short = _check_results(row, entered, calls, data)
    except ValueError as err:
        row.error = str(err)
    else:
        row.seconds = _interleaved(calls, data, short, repeats, patience,
                                   case.name if progress else None)
    row.peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not case.upstream_fits:
        row.upstream_bytes = contestants.upstream_bytes(case)
    return row


def check(want: Any, got: Any) -> float:
    """Largest relative difference, by norm, of a gradient leaf.

    Raises
    ------
    ValueError
        The trees differ, a leaf is not finite, one is zero where it should not be, or all are.
    """
    if jax.tree.structure(want) != jax.tree.structure(got):
        raise ValueError('the gradients are not of the same structure')
    worst = None
    for (path, a), b in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size, name = float(np.linalg.norm(a)), jax.tree_util.keystr(path)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f'the gradient of {name} is not finite')
        if size > 0.:
            worst = max(worst or 0., float(np.linalg.norm(a - b)) / size)
        elif b.any():                                   # upstream leaves this weight alone
            raise ValueError(f'the gradient of {name} is not zero as it should be')
    if worst is None:
        raise ValueError('every gradient is zero: an agreement proves nothing')
    return worst


def _check_spikes(row: Row) -> None:
    if row.case.spiking:
        row.spikes = contestants.spikes_per_neuron(row.case)
        if not row.spikes >= FEWEST_SPIKES:
            raise ValueError(f'the net does not spike ({row.spikes:.3f} a neuron)')


def _check_learned(grads: Any, learned: set[str]) -> None:
    """No weight that the rule learns has a zero gradient; upstream leaves some others alone."""
    for path, grad in grads.items():
        name = '.'.join(map(str, path))
        if name in learned and not any(np.asarray(a).any() for a in jax.tree.leaves(grad)):
            raise ValueError(f'the gradient of {name} is zero: an agreement proves nothing')


def _check_small(row: Row) -> None:
    """Of a case that upstream cannot run: the same net with a smaller batch."""
    small = dataclasses.replace(row.case, batch=row.case.check_batch)
    data = contestants.data(small)
    results = {}
    for who in ('upstream', 'free'):
        call = brainstate.transform.jit(contestants.enter(small, who).call)
        results[who] = call(*data)
    _compare(row, results)


def _compiled(row: Row, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contestants and their jitted calls; what compiling took, and the memory needed."""
    data = contestants.data(row.case)
    entered: dict[str, contestants.Contestant] = {}
    calls: dict[str, Any] = {}
    for _ in range(rounds):
        for who in row.case.contestants:
            entered.pop(who, None)
            calls.pop(who, None)                  # two copies of a large trace might not fit
            entered[who] = contestants.enter(row.case, who)
            calls[who] = brainstate.transform.jit(entered[who].call)
            start = time.perf_counter()
            program = calls[who].lower(*data).compile()         # the call below finds it made
            took = time.perf_counter() - start
            row.compile_seconds[who] = min(took, row.compile_seconds.get(who, math.inf))
            row.memory[who] = contestants.program_bytes(program)
    row.engines = {who: made.engine for who, made in entered.items() if made.engine}
    return entered, calls


def _check_results(row: Row, entered: dict[str, Any], calls: dict[str, Any],
                   data: Any) -> dict[str, float]:
    """Two calls of everybody, the second from the trace that the first left; seconds of it.

    The first of ``carry_trace=False`` is comparable only: later ones start from a zero trace.
    """
    results = {who: jax.block_until_ready(call(*data)) for who, call in calls.items()}
    _compare(row, results)
    for who, (grads, _) in results.items():
        if grads is not None:
            check(grads, grads)                                  # finite, and not all zero
            _check_learned(grads, entered[who].learned)
    del results
    seconds, results = {}, {}
    for who, call in calls.items():
        start = time.perf_counter()
        result = jax.block_until_ready(call(*data))
        seconds[who] = time.perf_counter() - start
        results[who] = result if who in ('upstream', 'traceops') else (None, result[1])
        del result
    _compare(row, results)
    return seconds


def _compare(row: Row, results: dict[str, Any]) -> None:
    """Every loss is that of the others, every online gradient is upstream's."""
    losses = {who: float(loss) for who, (_, loss) in results.items()}
    first = next(iter(losses.values()))
    for who, loss in losses.items():
        if not abs(loss - first) <= TOLERANCE * abs(first):
            raise ValueError(f'the loss of {who} is {loss:.8g}, not {first:.8g}')
    for who in ('traceops', 'free'):
        if 'upstream' not in results or results.get(who, (None,))[0] is None:
            continue
        difference = check(results['upstream'][0], results[who][0])
        row.difference = max(difference, row.difference or 0.)
        if not difference <= TOLERANCE:
            raise ValueError(f'gradients of {who} differ by {difference:.1e} '
                             f'(limit {TOLERANCE:.0e})')


def _interleaved(calls: dict[str, Any], data: Any, short: dict[str, float], repeats: int,
                 patience: float, label: str | None) -> dict[str, list[float]]:
    """Calls in an order that mixes everybody evenly over the whole measurement.

    A contestant of n calls is called once in each n-th of the time, at random there, so that
    slow and fast ones meet the same moments of the machine, and each other in any order.
    """
    rng = random.Random(0)
    counts = {who: max(repeats, min(60, int(patience / max(s, 1e-9))))
              for who, s in short.items()}
    order = sorted(((i + rng.random()) / n, who) for who, n in counts.items() for i in range(n))
    times: dict[str, list[float]] = {who: [] for who in calls}
    for _, who in tqdm(order, desc=label or '', disable=label is None, leave=False):
        start = time.perf_counter()
        jax.block_until_ready(calls[who](*data))
        times[who].append(time.perf_counter() - start)
    return times
