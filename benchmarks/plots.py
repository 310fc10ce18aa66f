# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Time against N, and time against T."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import matplotlib

from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import run

__all__ = ['main']

_LABEL = {'upstream': 'upstream', 'traceops': 'traceops', 'free': 'traceops, no carry',
          'bptt': 'BPTT', 'forward': 'simulation only'}
_COLOUR = {'upstream': '#c0392b', 'traceops': '#1f6f8b', 'free': '#2a9d8f', 'bptt': '#999999',
           'forward': '#444444'}
_BASE = Case('sweep', 'lif', 'D_RTRL', 128, None, None)


def main(folder: pathlib.Path, repeats: int) -> dict[str, Any]:
    """Measure both sweeps; write ``time-n.png``, ``time-t.png`` and ``memory-t.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for name, field, values in (('time-n', 'n', (32, 64, 128, 256)),
                                ('time-t', 'steps', (25, 50, 100, 200))):
        rows = {v: run(dataclasses.replace(_BASE, name=f'{field}={v}', **{field: v}), repeats)
                for v in values}
        out[name] = {v: {k: r.median(k) for k in r.seconds} for v, r in rows.items()}
        label = 'recurrent neurons N' if field == 'n' else 'steps T'
        _plot(folder / f'{name}.png', {v: {k: s * 1e3 for k, s in row.items()}
                                       for v, row in out[name].items()},
              label, 'ms per gradient')
    out['memory-t'] = {v: {k: n / 2 ** 20 for k, n in r.memory.items()} for v, r in rows.items()}
    _plot(folder / 'memory-t.png', out['memory-t'], label, 'MiB of states, trace and temporaries')
    return out


def _plot(path: pathlib.Path, data: dict[int, dict[str, float]], xlabel: str,
          ylabel: str) -> None:
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
    xs = list(data)
    for who in data[xs[0]]:
        ys = [data[x][who] for x in xs]
        ax.plot(xs, ys, 'o-', color=_COLOUR[who], lw=1.8, ms=4)
        ax.annotate(_LABEL[who], (xs[-1], ys[-1]), xytext=(6, 0), textcoords='offset points',
                    color=_COLOUR[who], va='center', fontsize=9)
    ax.set(xscale='log', yscale='log', xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(xs, list(map(str, xs)))
    ax.minorticks_off()
    ax.margins(x=0.25)
    ax.spines[['top', 'right']].set_visible(False)
    ax.set_title('D-RTRL, LIF, B = 32', loc='left', fontsize=11)
    fig.savefig(path, dpi=150)
    plt.close(fig)
