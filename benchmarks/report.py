# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures of a run as tables and data."""

from __future__ import annotations

import dataclasses
import os
import platform
from importlib import metadata
from typing import Any

import numpy as np
from rich.table import Table

import traceops
from traceops.benchmarks.cases import COMPILE_BAR, LEARNING_BAR, Case
from traceops.benchmarks.measure import Row
from traceops.text import render

__all__ = ['LABELS', 'busy', 'failed', 'figures', 'line', 'machine', 'machine_text', 'markdown',
           'summary', 'tables']

#: What the contestants are called in tables and plots.
LABELS = {'upstream': 'upstream', 'traceops': 'traceops', 'free': 'traceops, no carry',
          'bptt': 'BPTT', 'forward': 'forward only'}
_OURS = ('traceops', 'free')


# ------------------------------------------------------------------------------ machine

def machine() -> dict[str, Any]:
    """The machine and the versions."""
    cpu = platform.processor() or 'unknown CPU'
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            names = [text.split(':', 1)[1].strip() for text in f if text.startswith('model name')]
        cpu = names[0] if names else cpu
    versions = {p: metadata.version(p)
                for p in ('jax', 'braintrace', 'brainstate', 'brainpy', 'braintools', 'saiunit')}
    return {'cpu': cpu, 'cores': os.cpu_count(), 'memory': _memory(), 'load': os.getloadavg()[0],
            'python': platform.python_version(),
            'versions': {'traceops': traceops.__version__, **versions}}


def _memory() -> int:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def machine_text(m: dict[str, Any]) -> str:
    """One line for the head of a report."""
    versions = ', '.join(f'{k} {v}' for k, v in m['versions'].items())
    return (f'{m["cpu"]}, {m["cores"]} cores, {m["memory"] / 2 ** 30:.0f} GiB; '
            f'Python {m["python"]}, {versions}; float32')


def busy(m: dict[str, Any]) -> str:
    """A warning when others are at work on the machine, else nothing."""
    if m['load'] < 0.5:
        return ''
    return (f'The machine is busy (load {m["load"]:.1f} on {m["cores"]} cores): '
            f'these times are not to be quoted.')


# ------------------------------------------------------------------------------ figures

def figures(row: Row) -> dict[str, Any]:
    """Everything measured of a row, JSON-ready; bytes and seconds."""
    case = row.case
    out = {
        'name': case.name, 'case': dataclasses.asdict(case), 'error': row.error,
        'difference': row.difference, 'spikes_per_neuron': row.spikes, 'engines': row.engines,
        'seconds': {who: {f'p{q}': float(np.percentile(t, q)) for q in (20, 50, 80)}
                    | {'calls': len(t)} for who, t in row.seconds.items()},
        'compile_seconds': row.compile_seconds, 'memory': row.memory, 'peak_rss': row.peak_rss,
        'upstream_bytes': row.upstream_bytes,
        'ratio': row.ratio('upstream', 'traceops'), 'ratio_free': row.ratio('upstream', 'free'),
        'learning': {who: row.ratio(who, 'forward') for who in _OURS if who in row.seconds},
        'over_bptt': {who: row.ratio(who, 'bptt') for who in _OURS if who in row.seconds},
        'compile_ratio': {who: row.compile_seconds[who] / row.compile_seconds['upstream']
                          for who in _OURS if {who, 'upstream'} <= set(row.compile_seconds)},
    }
    return {**out, 'aims': [] if row.error else _aims(case, out)}


def failed(case: Case, why: str) -> dict[str, Any]:
    """The figures of a case that did not run."""
    return figures(Row(case, error=why))


def _aims(case: Case, f: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at and whether it was met."""
    lean = 'free' if 'free' in f['learning'] else 'traceops'    # ES-D-RTRL carries vectors
    aims = [('upstream / traceops', f['ratio'], case.bar, True),
            ('upstream / no carry', f['ratio_free'], case.bar_free, True),
            ('learning / forward', f['learning'].get(lean), LEARNING_BAR, False),
            ('learning / BPTT', f['over_bptt'].get(lean), 1., False),
            ('compile', max(f['compile_ratio'].values(), default=None), COMPILE_BAR, False),
            ('peak GiB', f['peak_rss'] / 2 ** 30, _over(case.memory_bar, 2 ** 30), False)]
    return [{'what': what, 'value': value, 'bar': bar, 'at_least': at_least,
             'met': value >= bar if at_least else value <= bar}
            for what, value, bar, at_least in aims if value is not None and bar is not None]


def _over(a: float | None, b: float) -> float | None:
    return None if a is None else a / b


# ------------------------------------------------------------------------------ text

def line(f: dict[str, Any]) -> str:
    """A row in a line, as soon as it is known."""
    if f['error']:
        return f'{f["name"]}: REFUSED, {f["error"]}'
    check = [] if f['difference'] is None else [f'gradients differ by {f["difference"]:.1e}']
    if f['spikes_per_neuron'] is not None:
        check.append(f'{f["spikes_per_neuron"]:.1f} spikes a neuron')
    times = [f'{LABELS[who]} {t["p50"] * 1e3:.3g} ms' for who, t in f['seconds'].items()]
    return f'{f["name"]}: {"; ".join([*check, ", ".join(times)])}'


def tables(rows: list[dict[str, Any]]) -> str:
    """The tables of a run: times, and ratios against what was aimed at."""
    times = Table(title='ms a gradient: p50 (p20 to p80)', title_justify='left')
    for name in ('case', *LABELS.values()):
        times.add_column(name, justify='left' if name == 'case' else 'right')
    for f in rows:
        times.add_row(f['name'], *(_spread(f, who) for who in LABELS))
    ratios = Table(title='ratios of the medians (aim)', title_justify='left')
    for name in _HEAD:
        ratios.add_column(name, overflow='fold')
    for f in rows:
        ratios.add_row(f['name'], *([f'REFUSED: {f["error"]}'] if f['error'] else _ratios(f)))
    return render(times) + '\n' + render(ratios)


_HEAD = ('case', 'upstream / traceops', 'upstream / no carry', 'learning / forward',
         'learning / BPTT', 'compile', 'memory MB', 'difference', 'spikes')


def _spread(f: dict[str, Any], who: str) -> str:
    t = f['seconds'].get(who)
    if t is None:
        return _too_large(f) if who == 'upstream' else '-'
    p20, p50, p80 = (f'{t[p] * 1e3:.3g}' if t[p] < 1 else f'{t[p] * 1e3:.0f}'
                     for p in ('p20', 'p50', 'p80'))
    return f'{p50} ({p20} to {p80})'


def _too_large(f: dict[str, Any]) -> str:
    need = f['upstream_bytes']
    if need is None:
        return '-'
    verdict = 'does not fit' if need > _memory() else 'was not run'
    return f'needs {need / 1e9:.1f} GB: {verdict}'


def _ratios(f: dict[str, Any]) -> list[str]:
    aim = {a['what']: a for a in f['aims']}

    def cell(what: str, value: float | None, form: str) -> str:
        if value is None:
            return '-'
        a = aim.get(what)
        text = format(value, form)
        return text if a is None else f'{text} ({"" if a["met"] else "MISSED "}{a["bar"]:g})'

    def both(what: str, values: dict[str, float]) -> str:
        a = aim.get(what)
        missed = f' (MISSED {a["bar"]:g})' if a is not None and not a['met'] else ''
        return ', '.join(f'{v:.2f}' for v in values.values()) + missed or '-'
    memory = [f'{f["memory"][who] / 1e6:.0f}' for who in ('upstream', *_OURS) if who in f['memory']]
    return [cell('upstream / traceops', f['ratio'], '.3g'),
            cell('upstream / no carry', f['ratio_free'], '.3g'),
            both('learning / forward', f['learning']), both('learning / BPTT', f['over_bptt']),
            both('compile', f['compile_ratio']), ', '.join(memory),
            '-' if f['difference'] is None else f'{f["difference"]:.1e}',
            '-' if f['spikes_per_neuron'] is None else f'{f["spikes_per_neuron"]:.1f}']


def markdown(rows: list[dict[str, Any]], m: dict[str, Any]) -> str:
    """The table for a README."""
    head = ('case', 'upstream ms', 'traceops ms', 'no carry ms', 'BPTT ms', 'forward ms',
            'upstream / traceops', 'no carry', 'learning / forward', 'compile')
    lines = [f'{machine_text(m)}.', '', '| ' + ' | '.join(head) + ' |',
             '|---' + '|---:' * (len(head) - 1) + '|']
    for f in rows:
        if f['error']:
            cells = [f'refused: {f["error"]}', *[''] * (len(head) - 2)]
        else:
            lean = 'free' if 'free' in f['learning'] else 'traceops'
            slower = ' (slower than BPTT)' if f['over_bptt'][lean] > 1 else ''
            cells = [_median(f, who) for who in LABELS]
            cells += [_times(f['ratio']), _times(f['ratio_free']),
                      f'{f["learning"][lean]:.2f}{slower}',
                      f'{max(f["compile_ratio"].values()):.2f}' if f['compile_ratio'] else '-']
        case = Case(**f['case'])
        lines.append('| ' + ' | '.join([f'{f["name"]} ({case.text})', *cells]) + ' |')
    return '\n'.join(lines) + '\n'


def _median(f: dict[str, Any], who: str) -> str:
    t = f['seconds'].get(who)
    if t is None:
        return _too_large(f) if who == 'upstream' else '-'
    return f'{t["p50"] * 1e3:.1f}' if t['p50'] < 0.1 else f'{t["p50"] * 1e3:.0f}'


def _times(value: float | None) -> str:
    return '-' if value is None else f'{value:.1f}x' if value < 10 else f'{value:.0f}x'


def summary(rows: list[dict[str, Any]]) -> str:
    """Which of the aims were met, and everything that was lost."""
    aims = [(f['name'], a) for f in rows for a in f['aims']]
    missed = [f'{name}: {a["what"]} {a["value"]:.3g}, aimed at '
              f'{">=" if a["at_least"] else "<="} {a["bar"]:g}' for name, a in aims if not a['met']]
    lines = [f'{len(aims) - len(missed)} of {len(aims)} aims met']
    lines += [f'  missed   {text}' for text in missed]
    lines += [f'  refused  {f["name"]}: {f["error"]}' for f in rows if f['error']]
    lines += [f'  slower   {f["name"]}: traceops takes {1 / f["ratio"]:.2f} of upstream\'s time'
              for f in rows if f['ratio'] is not None and f['ratio'] < 1]
    lines += [f'  note     {f["name"]}: with the trace carried slower than BPTT '
              f'({f["over_bptt"]["traceops"]:.2f} of its time)'
              for f in rows if 'free' in f['over_bptt'] and f['over_bptt'].get('traceops', 0) > 1]
    lines += [f'  note     {f["name"]}: {LABELS[who]} ran as {engine}'
              for f in rows for who, engine in f['engines'].items()
              if who in _OURS and engine != 'window']
    return '\n'.join(lines)
