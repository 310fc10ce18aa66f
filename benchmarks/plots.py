# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Plots of a run: the rows, time against N, time and memory against T."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np

from traceops.benchmarks.report import LABELS

__all__ = ['draw']

_COLOURS = {'upstream': '#c0392b', 'traceops': '#7fb3c8', 'free': '#1f6f8b', 'bptt': '#999999',
            'forward': '#444444'}
Figures = dict[str, Any]


def draw(folder: pathlib.Path, rows: list[Figures],
         sweeps: dict[str, list[Figures]]) -> list[pathlib.Path]:
    """Write what there is to plot.

    Parameters
    ----------
    folder : pathlib.Path
        Made where it is missing.
    rows, sweeps : list and dict of list of dict
        Of :func:`traceops.benchmarks.report.figures`; refused ones are left out.

    Returns
    -------
    list of pathlib.Path
        The files: ``rows.png``, ``time-n.png``, ``time-t.png``, ``memory-t.png``.
    """
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    folder.mkdir(parents=True, exist_ok=True)
    good = {name: [f for f in sweep if not f['error']] for name, sweep in sweeps.items()}
    plans: dict[str, tuple[list[Figures], Callable[[Any, list[Figures]], None]]] = {
        'rows': ([f for f in rows if 'upstream' in f['seconds']], _rows),
        'time-n': (good.get('n', []), lambda ax, sweep: _lines(
            ax, sweep, 'n', 'recurrent neurons N', _milliseconds, 'ms a gradient')),
        'time-t': (good.get('steps', []), lambda ax, sweep: _lines(
            ax, sweep, 'steps', 'steps T', _milliseconds, 'ms a gradient')),
        'memory-t': (good.get('steps', []), lambda ax, sweep: _lines(
            ax, sweep, 'steps', 'steps T', _megabytes, 'MB of a training call')),
    }
    written = []
    style: Any = {'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False}
    with plt.rc_context(style):
        for name, (figures, plot) in plans.items():
            if not figures:
                continue
            height = 1.2 + 0.5 * len(figures) if name == 'rows' else 4.4
            fig, ax = plt.subplots(figsize=(7.2, height), layout='constrained')
            plot(ax, figures)
            written.append(folder / f'{name}.png')
            fig.savefig(written[-1], dpi=150)
            plt.close(fig)
    return written


def _milliseconds(f: Figures, who: str) -> float:
    return f['seconds'][who]['p50'] * 1e3


def _megabytes(f: Figures, who: str) -> float:
    return f['memory'][who] / 1e6


def _lines(ax: Any, sweep: list[Figures], field: str, xlabel: str,
           value: Callable[[Figures, str], float], ylabel: str) -> None:
    """One line each, named at its right end."""
    xs = [f['case'][field] for f in sweep]
    ends = {}
    for who in sweep[0]['seconds']:
        ys = [value(f, who) for f in sweep]
        ax.plot(xs, ys, 'o-', color=_COLOURS[who], lw=2, ms=4, clip_on=False)
        ends[who] = ys[-1]
    ax.set(xscale='log', yscale='log', xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(xs, list(map(str, xs)))
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
    ax.grid(axis='y', lw=0.4, color='#dddddd')
    case = sweep[0]['case']
    fixed = f'T = {case["steps"]}' if field == 'n' else f'N = {case["n"]}'
    ax.set_title(f'D-RTRL, LIF, {fixed}, B = {case["batch"]}', loc='left')
    for who, y in _spread_out(ax, ends).items():
        ax.annotate(LABELS[who], (1, y), xycoords='axes fraction', xytext=(8, 0),
                    textcoords='offset points', color=_COLOURS[who], va='center',
                    annotation_clip=False)


def _spread_out(ax: Any, ends: dict[str, float], gap: float = 0.065) -> dict[str, float]:
    """Heights of the names, in parts of the axis: at the lines' ends, but never overlapping."""
    low, high = np.log(ax.get_ylim())
    wanted = sorted((float((np.log(y) - low) / (high - low)), who) for who, y in ends.items())
    placed: dict[str, float] = {}
    below = -gap
    for y, who in wanted:
        below = placed[who] = max(y, below + gap)
    return placed


def _rows(ax: Any, rows: list[Figures]) -> None:
    """How many times faster than upstream, a pair of bars a row, with what was aimed at."""
    places = np.arange(len(rows))[::-1]
    for key, who, aim, shift in (('ratio', 'traceops', 'bar', 0.2),
                                 ('ratio_free', 'free', 'bar_free', -0.2)):
        for place, f in zip(places, rows, strict=True):
            if f[key] is None:
                continue
            y = place + (shift if f['ratio_free'] is not None else 0)
            ax.barh(y, f[key], height=0.36, color=_COLOURS[who])
            ax.annotate(f'{f[key]:.3g}', (f[key], y), xytext=(4, 0), va='center', fontsize=8,
                        textcoords='offset points', color=_COLOURS[who])
            if f['case'][aim] is not None:
                ax.plot([f['case'][aim]] * 2, [y - 0.18, y + 0.18], color='black', lw=1.4)
    ax.set_yticks(places, [f['name'] for f in rows])
    ax.tick_params(axis='y', length=0)
    ax.set(xscale='log', xlabel='times faster than upstream (black: aimed at)')
    ax.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
    ax.axvline(1, color='black', lw=0.8)
    for text, who, y in (('trace carried', 'traceops', 1.06), ('no carry', 'free', 1.0)):
        ax.annotate(text, (1, y), xycoords='axes fraction', ha='right', va='bottom',
                    color=_COLOURS[who], weight='bold')
