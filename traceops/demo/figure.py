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

BLUE, RED, GREY = '#1f6f8b', '#c0392b', '#666666'


def draw(path: pathlib.Path, history: dict[str, list[float]], image: Any, label: int,
         raster: Any, times: dict[str, float]) -> None:
    """Accuracy and loss, a raster of one digit, the time of an epoch."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.rcParams.update({'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False})
    fig = plt.figure(figsize=(11, 6.4), layout='constrained')
    grid = fig.add_gridspec(2, 3, width_ratios=(1.25, 1, 1))
    _curves(fig.add_subplot(grid[0, 0]), fig.add_subplot(grid[1, 0]), history)
    _picture(fig.add_subplot(grid[0, 1]), image, label)
    _bars(fig.add_subplot(grid[0, 2]), times)
    _raster(fig.add_subplot(grid[1, 1:]), raster)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _curves(top: Any, bottom: Any, history: dict[str, list[float]]) -> None:
    epochs = np.arange(1, len(history['accuracy']) + 1)
    accuracy = 100 * np.asarray(history['accuracy'])
    top.plot(epochs, accuracy, color=BLUE, lw=2)
    top.axhline(93, color=GREY, lw=0.8, ls=':')
    top.annotate(f'{accuracy[-1]:.1f} %', (epochs[-1], accuracy[-1]), xytext=(0, -14),
                 textcoords='offset points', ha='right', color=BLUE, weight='bold')
    top.set_title(f'Online learning reaches {accuracy[-1]:.1f} % on unseen digits', loc='left')
    top.set(ylabel='test accuracy, %', xlim=(1, epochs[-1]))
    bottom.plot(epochs, history['loss'], color=BLUE, lw=2)
    for ax in (top, bottom):
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    bottom.set_title('Loss', loc='left')
    bottom.set(xlabel='epoch', ylabel='cross-entropy', xlim=(1, epochs[-1]), ylim=(0, None))


def _picture(ax: Any, image: Any, label: int) -> None:
    ax.imshow(image, cmap='Greys')
    ax.set_title(f'A test digit ({label}), shown row by row', loc='left')
    ax.set_xticks([])
    ax.set_yticks([])


def _bars(ax: Any, times: dict[str, float]) -> None:
    names, values = list(times), list(times.values())
    ax.barh(names, values, color=[RED if n == 'upstream' else BLUE for n in names], height=0.55)
    for i, v in enumerate(values):
        ax.annotate(f'{v:.2f} s', (v, i), xytext=(4, 0), textcoords='offset points', va='center')
    ax.invert_yaxis()
    ax.set_xlim(0, max(values) * 1.25)
    title = f'One epoch, {values[0] / values[1]:.0f} times faster' if len(values) == 2 \
        else 'One epoch'
    ax.set_title(title, loc='left')
    ax.set_xlabel('seconds')


def _raster(ax: Any, raster: Any) -> None:
    steps, neurons = np.nonzero(raster)
    ax.scatter(steps, neurons, s=5, marker='|', color='black', linewidths=0.8)
    for t in range(4, 36, 4):
        ax.axvline(t - 0.5, color=GREY, lw=0.4, ls=':')
    ax.set_title(f'What the {raster.shape[1]} neurons answer '
                 f'({raster.mean() * 100:.0f} % spike at a step)', loc='left')
    ax.set(xlabel='step (dotted: the next row of the picture)', ylabel='neuron',
           xlim=(-0.5, raster.shape[0] - 0.5), ylim=(-1, raster.shape[1]))
