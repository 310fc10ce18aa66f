# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The diagrams of the pages: ``python docs/pictures.py`` writes docs/images/*.svg."""

import pathlib

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

FOLDER = pathlib.Path(__file__).parent / 'images'
BLUE, RED, GREY, PALE = '#1f6f8b', '#c0392b', '#555555', '#e6edf0'
STYLE = {'font.size': 10, 'svg.hashsalt': 'traceops', 'svg.fonttype': 'path',
         'mathtext.fontset': 'cm'}


def _box(ax, x, y, text, color=GREY, width=1.1, height=0.62, fill='white'):
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, fc=fill, ec=color,
                                boxstyle='round,pad=0.02,rounding_size=0.08', lw=1.4))
    ax.text(x, y, text, ha='center', va='center', color=color)


def _arrow(ax, start, end, color=GREY, text='', offset=(0, 0.14), style='-|>', dashed=False):
    ax.annotate('', end, start, arrowprops={
        'arrowstyle': style, 'color': color, 'lw': 1.4, 'shrinkA': 0, 'shrinkB': 0,
        'ls': '--' if dashed else '-'})
    if text:
        ax.text((start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1], text,
                ha='center', va='center', color=color)


def _axes(width, height, xlim, ylim):
    fig, ax = plt.subplots(figsize=(width, height), layout='constrained')
    ax.set(xlim=xlim, ylim=ylim)
    ax.axis('off')
    return fig, ax


def two_directions():
    """The trace rolls forward; the adjoint of the signal comes back; the sum is the same."""
    fig, axes = plt.subplots(2, 1, figsize=(8, 5.4), layout='constrained')
    names = ('1', '2', '3', 'T')
    for ax in axes:
        ax.set(xlim=(-1.1, 8.2), ylim=(-1.75, 1.15))
        ax.axis('off')
    top, bottom = axes
    top.set_title('The trace forward: an array of batch x inputs x outputs x states, every step',
                  loc='left', color=RED, fontsize=10.5)
    bottom.set_title('The signal backward: an array of batch x outputs x states',
                     loc='left', color=BLUE, fontsize=10.5)
    for i, name in enumerate(names):
        x = 2 * i
        _box(top, x, 0.5, f'$e_{name}$', RED, width=1.2, height=0.9, fill='#fbeceb')
        _box(top, x, -1.3, f'$L_{name}$', GREY, height=0.5)
        _arrow(top, (x, -1.05), (x, 0.02), GREY)
        top.text(x + 0.12, -0.55, f'$L_{name}\\cdot e_{name}$', color=GREY, ha='left')
        _box(bottom, x, 0.5, f'$\\lambda_{name}$', BLUE, width=0.75, height=0.5, fill=PALE)
        _box(bottom, x, -1.3, f'$L_{name}$', GREY, height=0.5)
        _arrow(bottom, (x, -1.05), (x, 0.23), GREY)
        bottom.text(x + 0.12, -0.55, f'$x_{name}\\otimes(\\lambda_{name}\\cdot f_{name})$',
                    color=GREY, ha='left')
        if i:
            label = '$D$' if name != 'T' else r'$\cdots$'
            _arrow(top, (x - 1.38, 0.5), (x - 0.62, 0.5), RED, label)
            _arrow(bottom, (x - 0.4, 0.5), (x - 1.6, 0.5), BLUE,
                   r'$D^\top$' if name != 'T' else r'$\cdots$', (0, 0.2))
    top.text(7.1, 0.5, r'$dW=\sum_t L_t\cdot e_t$', color=RED, va='center')
    bottom.text(6.75, 0.5, r'$dW=X^\top\Delta$', color=BLUE, va='center')
    return fig


def window():
    """What is simulated, kept and recomputed in one window."""
    fig, ax = _axes(8.4, 4.3, (-0.2, 10.4), (-0.3, 5.1))
    rows = ((4.2, 'simulate', 'one step after the other', GREY),
            (3.0, 'residuals', 'kept of each step', BLUE),
            (1.8, 'recompute', 'all steps at once', GREY),
            (0.6, 'adjoint scan', 'element-wise, from the last step', BLUE))
    for y, name, said, color in rows:
        ax.text(0, y + 0.1, name, color=color, va='center', weight='bold')
        ax.text(0, y - 0.28, said, color=color, va='center', fontsize=8.5)
    xs = [3.7, 4.9, 6.1, 7.3]
    for i, x in enumerate(xs):
        name = str(i + 1) if i < 3 else 'T'
        _box(ax, x, 4.2, f'$h_{name}$', GREY, width=0.7, height=0.5)
        ax.add_patch(Rectangle((x - 0.16, 2.84), 0.32, 0.32, fc=PALE, ec=BLUE, lw=1.3))
        _arrow(ax, (x, 3.93), (x, 3.2), GREY)
        _arrow(ax, (x, 2.8), (x, 2.16), GREY)
        _arrow(ax, (x, 1.44), (x, 0.9), GREY)
        _box(ax, x, 0.6, f'$\\lambda_{name}$', BLUE, width=0.7, height=0.5, fill=PALE)
        if i:
            _arrow(ax, (xs[i - 1] + 0.38, 4.2), (x - 0.38, 4.2), GREY)
            _arrow(ax, (x - 0.38, 0.6), (xs[i - 1] + 0.38, 0.6), BLUE)
    ax.add_patch(FancyBboxPatch((3.3, 1.5), 4.4, 0.6, fc='white', ec=GREY, lw=1.4,
                                boxstyle='round,pad=0.02,rounding_size=0.08'))
    ax.text(5.5, 1.8, r'losses, $L_t$, $D_t$, $f_t$', ha='center', va='center', color=GREY)
    _box(ax, 9.3, 0.6, r'$dW=X^\top\Delta$', BLUE, width=1.7, height=0.62, fill=PALE)
    _arrow(ax, (7.7, 0.6), (8.42, 0.6), BLUE)
    ax.text(9.3, 4.2, 'bound to the clock\nof the recurrence', ha='center', va='center',
            color=GREY, fontsize=9)
    ax.text(9.3, 1.8, 'bound to nothing', ha='center', va='center', color=GREY, fontsize=9)
    return fig


def main():
    with plt.rc_context(STYLE):
        for draw in (two_directions, window):
            fig = draw()
            fig.savefig(FOLDER / f'{draw.__name__}.svg', metadata={'Date': None})
            plt.close(fig)


if __name__ == '__main__':
    main()
