# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo's figure."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np

__all__ = ['draw']

BLUE, RED, GREY, PALE = '#1f6f8b', '#c0392b', '#666666', '#c9d3d8'


def draw(path: pathlib.Path, history: dict[str, list[float]], tested: float,
         shown: dict[str, Any], times: dict[str, float]) -> None:
    """How it was learned (left), and what happens while one test digit is shown (right)."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    style: Any = {'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False,
             'axes.titlelocation': 'left', 'axes.titlesize': 11}
    with plt.rc_context(style):
        fig = plt.figure(figsize=(12, 7.2), layout='constrained')
        grid = fig.add_gridspec(1, 2, width_ratios=(1, 1.5), wspace=0.06)
        learned = grid[0, 0].subgridspec(3, 1, height_ratios=(1.3, 1, 0.6))
        left: Any = learned.subplots()
        accuracy, loss, time = left
        _accuracy(accuracy, history['accuracy'], tested)
        _loss(loss, history['loss'])
        _bars(time, times)
        lived = grid[0, 1].subgridspec(3, 1, height_ratios=(0.75, 1.5, 0.9))
        right: Any = lived.subplots(sharex=True)
        _input(right[0], shown)
        _spikes(right[1], shown['spikes'])
        _belief(right[2], shown)
        fig.savefig(path, dpi=150)
        plt.close(fig)


def _accuracy(ax: Any, accuracy: list[float], tested: float) -> None:
    epochs = np.arange(1, len(accuracy) + 1)
    ax.plot(epochs, 100 * np.asarray(accuracy), color=BLUE, lw=2)
    ax.plot(epochs[-1], 100 * tested, 'o', color=RED, clip_on=False, zorder=3)
    ax.annotate(f'test {100 * tested:.1f} %', (epochs[-1], 100 * tested), xytext=(-8, -16),
                textcoords='offset points', ha='right', color=RED, weight='bold')
    ax.axhline(93, color=GREY, lw=0.8, ls=':')
    ax.set_title('Digits named correctly')
    ax.set(ylabel='validation, %', xlim=(1, epochs[-1]))
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def _loss(ax: Any, loss: list[float]) -> None:
    epochs = np.arange(1, len(loss) + 1)
    ax.semilogy(epochs, loss, color=BLUE, lw=2)
    ax.set_title('Loss while learning')
    ax.set(xlabel='epoch', ylabel='cross-entropy', xlim=(1, epochs[-1]))
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def _bars(ax: Any, times: dict[str, float]) -> None:
    names, values = list(times), list(times.values())
    ax.barh(names, values, color=[RED if n == 'upstream' else BLUE for n in names], height=0.6)
    for i, v in enumerate(values):
        ax.annotate(f'{v:.2f} s', (v, i), xytext=(4, 0), textcoords='offset points', va='center')
    ax.invert_yaxis()
    ax.set_xlim(0, max(values) * 1.25)
    ax.set_title(f'One epoch, {values[0] / values[1]:.0f} times faster' if len(values) == 2
                 else 'One epoch')
    ax.set_xlabel('seconds')


def _input(ax: Any, shown: dict[str, Any]) -> None:
    _raster(ax, shown['input'], 'input line', RED)
    ax.set_title(f'A test digit ({shown["label"]}) is seen row by row, then no more')
    inset = ax.inset_axes((0.86, 0.08, 0.14, 0.88))
    inset.imshow(shown['image'], cmap='Greys', aspect='auto')
    inset.set(xticks=[], yticks=[])


def _spikes(ax: Any, spikes: Any) -> None:
    _raster(ax, spikes, 'neuron', 'black')
    ax.set_title(f'{spikes.shape[1]} neurons answer with spikes '
                 f'({100 * spikes.mean():.0f} % at a step)')


def _raster(ax: Any, spikes: Any, name: str, color: str) -> None:
    steps, neurons = np.nonzero(spikes)
    ax.scatter(steps, neurons, s=7, marker='|', color=color, linewidths=0.9)
    ax.set(ylabel=name, xlim=(-0.5, len(spikes) - 0.5), ylim=(spikes.shape[1], -1))


def _belief(ax: Any, shown: dict[str, Any]) -> None:
    belief, label = shown['belief'], shown['label']
    for digit in range(belief.shape[1]):
        right = digit == label
        ax.plot(belief[:, digit], color=BLUE if right else PALE, lw=2.2 if right else 1.2,
                zorder=2 + right)
    for digit in {label, int(belief[-1].argmax())}:
        ax.annotate(str(digit), (len(belief) - 1, belief[-1, digit]), xytext=(5, 0),
                    textcoords='offset points', va='center', weight='bold',
                    color=BLUE if digit == label else GREY, annotation_clip=False)
    ax.axvspan(len(belief) / 2 - 0.5, len(belief) - 0.5, color=PALE, alpha=0.25, lw=0)
    ax.set_title('The readout makes up its mind (shaded: judged while learning)')
    ax.set(xlabel='step', ylabel='probability', ylim=(-0.02, 1.02))
