# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures of a run as tables and data."""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from rich.table import Table

import traceops
from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import Row
from traceops.text import render

__all__ = ['each', 'failed', 'figures', 'line', 'machine', 'machine_text', 'markdown', 'slower',
           'summary', 'table']

LEARNING_BAR, COMPILE_BAR = 2.5, 1.5

_ROOT = pathlib.Path(__file__).resolve().parents[1]

#: Of two runs: what differs by less is noise.
NOISE = 1.25


def machine() -> dict[str, Any]:
    """The machine and the versions."""
    cpu = platform.processor() or 'unknown'
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            names = [line.split(':', 1)[1].strip() for line in f if line.startswith('model name')]
        cpu = names[0] if names else cpu
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    versions = {p: metadata.version(p) for p in ('jax', 'braintrace', 'brainstate', 'brainpy')}
    versions |= {'traceops': traceops.__version__ + _commit(_ROOT)}
    gpu = jax.devices()[0].device_kind if jax.default_backend() == 'gpu' else ''
    return {'gpu': gpu, 'cpu': cpu, 'cores': os.cpu_count(), 'memory': memory,
            'python': platform.python_version(), 'versions': versions}


def _commit(root: pathlib.Path) -> str:
    """``'+COMMIT'`` of a checkout, with ``-dirty`` where it was edited; else nothing."""
    if not (root / '.git').exists():
        return ''
    try:
        said = subprocess.run(['git', '-C', str(root), 'describe', '--always', '--dirty',
                               '--exclude', '*'], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ''
    return f'+{said.stdout.strip()}'


def machine_text() -> str:
    """One line for the head of a report."""
    m = machine()
    versions = ', '.join(f'{k} {v}' for k, v in m['versions'].items())
    gpu = f'{m["gpu"]}; ' if m['gpu'] else ''
    precision = jax.config.jax_default_matmul_precision
    return (f'{gpu}{m["cpu"]}, {m["cores"]} cores, {m["memory"] / 2 ** 30:.0f} GiB; '
            f'Python {m["python"]}, {versions}; float32'
            + (f', products in {precision}' if precision else ''))


def figures(row: Row) -> dict[str, Any]:
    """Everything measured of a row, JSON-ready."""
    case = row.case
    times = {k: {f'p{q}': float(np.percentile(v, q)) for q in (20, 50, 80)} | {'rounds': len(v)}
             for k, v in row.seconds.items()}
    learner = 'free' if 'free' in times else 'traceops'
    bar, bar_free = _aims(case)
    return {
        'name': case.name, 'error': row.error, 'difference': row.difference,
        'spikes_per_neuron': row.spikes, 'seconds': times,
        'compile_seconds': row.compile_seconds, 'memory': row.memory,
        'peak_memory': row.peak_memory,
        'trace_bytes': case.trace_bytes if case.rule == 'D_RTRL' else None,
        'upstream_fits': case.upstream_fits, 'bar': bar, 'bar_free': bar_free,
        'ratio': row.ratio('upstream', 'traceops'), 'ratio_free': row.ratio('upstream', 'free'),
        'learning_over_forward': row.ratio(learner, 'forward'),
        'carried_over_forward': row.ratio('traceops', 'forward') if 'free' in times else None,
        'over_bptt': row.ratio(learner, 'bptt'),
        'compile_ratio': _over(row.compile_seconds.get('traceops'),
                               row.compile_seconds.get('upstream')),
    }


def _aims(case: Case) -> tuple[float | None, float | None]:
    """Those of the case are for a CPU; elsewhere, not to be slower than upstream."""
    aims = case.bar, case.bar_free
    if jax.default_backend() == 'cpu':
        return aims
    bar, bar_free = (None if aim is None else 1. for aim in aims)
    return bar, bar_free


def failed(case: Case, why: str) -> dict[str, Any]:
    """The figures of a case that did not run."""
    return figures(Row(case, error=why))


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None else None


def _ratio(value: float | None, bar: float | None) -> str:
    if value is None:
        return '-'
    digits = f'{value:.3g}' if value < 1000 else f'{value:.0f}'
    return f'{digits}x' + ('' if bar is None else f' ({"met" if value >= bar else "MISSED"} '
                              f'{bar:g})')


def _ms(figures: dict[str, Any], who: str) -> str:
    t = figures['seconds'].get(who)
    return '-' if t is None else f'{t["p50"] * 1e3:.1f}'


def line(f: dict[str, Any]) -> str:
    """A row in a line, as soon as it is known."""
    if f['error']:
        return f'{f["name"]}: REFUSED, {f["error"]}'
    spread = ', '.join(f'{who} {t["p20"] * 1e3:.1f}/{t["p50"] * 1e3:.1f}/{t["p80"] * 1e3:.1f} ms'
                       for who, t in f['seconds'].items())
    check = '' if f['difference'] is None else f'gradients differ by {f["difference"]:.1e}; '
    spikes = '' if f['spikes_per_neuron'] is None else f'{f["spikes_per_neuron"]:.1f} spikes; '
    return f'{f["name"]}: {check}{spikes}p20/p50/p80 {spread}'


_HEAD = ('case', 'upstream ms', 'traceops ms', 'reset ms', 'no carry ms', "backend='jax' ms",
         'BPTT ms', 'forward ms', 'forward, kernel ms', 'upstream / traceops', 'no carry',
         'learning / forward', 'carried / forward', 'compile', 'peak GiB')


def _cells(f: dict[str, Any]) -> list[str]:
    if f['error']:
        return [f['name'], f'REFUSED: {f["error"]}', *[''] * (len(_HEAD) - 2)]
    upstream = _ms(f, 'upstream') if f['upstream_fits'] else \
        f'trace alone {f["trace_bytes"] / 1e9:.1f} GB a copy'
    slower = '' if f['over_bptt'] is None or f['over_bptt'] <= 1 else ' (slower than BPTT)'
    lf = f['learning_over_forward']
    carried = f['carried_over_forward']
    return [f['name'], upstream, *(_ms(f, who) for who in (
                'traceops', 'reset', 'free', 'xla', 'bptt', 'forward', 'kernel')),
            _ratio(f['ratio'], f['bar']),
            _ratio(f['ratio_free'], f['bar_free']), f'{lf:.2f}{slower}' if lf else '-',
            f'{carried:.2f}' if carried else '-',
            f'{f["compile_ratio"]:.2f}' if f['compile_ratio'] else '-',
            f'{f["peak_memory"] / 2 ** 30:.1f}']


def _columns(head: Sequence[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns in which no row has anything."""
    told = [i for i in range(len(head)) if not rows or any(row[i] not in ('', '-') for row in rows)]
    return [head[i] for i in told], [[row[i] for i in told] for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """The table of a run."""
    out = Table()
    head, cells = _columns(_HEAD, [_cells(f) for f in rows])
    for name in head:
        out.add_column(name, overflow='fold')
    for row in cells:
        out.add_row(*row)
    return render(out, width=200)


def each(cases: Sequence[Any], measure: Callable[[Any], dict[str, Any]], head: Sequence[str],
         cells: Callable[[dict[str, Any]], list[str]]) -> list[dict[str, Any]]:
    """Measure one after the other: a line as soon as it is known, the table at the end."""
    print(machine_text())
    rows = []
    for case in cases:
        rows.append(measure(case))
        print(' | '.join(cells(rows[-1])), flush=True)
    out = Table()
    for name in head:
        out.add_column(name, overflow='fold')
    for row in rows:
        out.add_row(*cells(row))
    print(render(out, width=160))
    return rows


def markdown(rows: list[dict[str, Any]], head: Sequence[str] = _HEAD,
             cells: Callable[[dict[str, Any]], list[str]] = _cells) -> str:
    """The same table for a README."""
    head, told = _columns(head, [cells(f) for f in rows])
    lines = [machine_text() + '.', '', '| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
    lines += ['| ' + ' | '.join(row) + ' |' for row in told]
    return '\n'.join(lines) + '\n'


def summary(rows: list[dict[str, Any]]) -> str:
    """Which of the aims were met."""
    missed = []
    for f in rows:
        for key, bar in (('ratio', f['bar']), ('ratio_free', f['bar_free'])):
            if bar is not None and f[key] is not None and f[key] < bar:
                missed.append(f'{f["name"]}: {key} {f[key]:.2f} < {bar:g}')
        if (f['learning_over_forward'] or 0) > LEARNING_BAR:
            missed.append(f'{f["name"]}: learning / forward '
                          f'{f["learning_over_forward"]:.2f} > {LEARNING_BAR}')
        if (f['compile_ratio'] or 0) > COMPILE_BAR:
            missed.append(f'{f["name"]}: compile {f["compile_ratio"]:.2f} > {COMPILE_BAR}')
        if f['error']:
            missed.append(f'{f["name"]}: {f["error"]}')
    return 'every aim met' if not missed else 'missed:\n' + '\n'.join(f'  {m}' for m in missed)


def slower(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What got slower since an earlier run, a line each.

    Compared are the ratios of a row to the simulation of its own run, which the machine and its
    load move less than times; compile times to upstream's. On another machine it is said so.

    Parameters
    ----------
    now, before : dict
        What ``--json`` writes.
    """
    lines = []
    keys = ('cpu', 'gpu', 'cores')
    if any(now['machine'].get(k) != before['machine'].get(k) for k in keys):
        lines.append('note: the earlier run is of another machine '
                     f'({before["machine"].get("gpu") or before["machine"].get("cpu")})')
    earlier = {row['name']: row for row in before['rows']}
    found = []
    for row in now['rows']:
        was = earlier.get(row['name'])
        for what, a, b in _costs(row, was) if was else ():
            if a > NOISE * b:
                found.append(f'{row["name"]}: {what} {b:.2f} -> {a:.2f}')
    return [*lines, *found] if found else []


def _costs(row: dict[str, Any], was: dict[str, Any]) -> list[tuple[str, float, float]]:
    """``(name, now, before)`` of every ratio that both runs have."""
    def of(f: dict[str, Any]) -> dict[str, float | None]:
        times = {who: t['p50'] for who, t in f['seconds'].items()}
        forward = times.get('forward')
        return {**{f'{who} / forward': _over(times.get(who), forward)
                   for who in ('traceops', 'free')}, 'compile': f['compile_ratio']}
    new, old = of(row), of(was)
    return [(k, a, b) for k, a in new.items() if a is not None and (b := old[k]) is not None]
