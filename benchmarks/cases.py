# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What is measured, and the ratios aimed at."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ['CASES', 'COMPILE_BAR', 'LEARNING_BAR', 'SWEEPS', 'Case']

#: Aims of every row: learning / forward-only, and compile time traceops / upstream.
LEARNING_BAR, COMPILE_BAR = 2.5, 1.5


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Parameters
    ----------
    name : str
        As in ``--cases``.
    net : str
        Of :func:`traceops.benchmarks.nets.make`.
    rule : {'D_RTRL', 'ES_D_RTRL'}
        The learning rule.
    n : int
        Recurrent neurons (of each layer).
    bar, bar_free : float or None
        Aimed-at upstream / traceops, with the trace carried and with ``carry_trace=False``.
    steps, batch, n_in, n_out : int
        T, B, inputs, outputs.
    vmap : bool
        The learner is compiled with ``vmap=True`` instead of batched states.
    window : int or None
        Steps of a window; ``None``: chosen by traceops.
    upstream_fits : bool
        ``False``: nobody who carries the trace is run, since it would not fit; what upstream
        would need is taken from its compiled program.
    check_batch : int or None
        Batch of the gradient check, where upstream fits with a smaller one only.
    memory_bar : int or None
        Aimed-at peak memory of the process, in bytes.
    heavy : bool
        Takes minutes; ``--quick`` leaves it out.
    """

    name: str
    net: str
    rule: str
    n: int
    bar: float | None
    bar_free: float | None = None
    steps: int = 50
    batch: int = 32
    vmap: bool = False
    n_in: int = 50
    n_out: int = 10
    window: int | None = None
    upstream_fits: bool = True
    check_batch: int | None = None
    memory_bar: int | None = None
    heavy: bool = False

    @property
    def spiking(self) -> bool:
        return 'lif' in self.net

    @property
    def options(self) -> dict[str, Any]:
        """What the rule is made with."""
        return {'decay_or_rank': 0.99} if self.rule == 'ES_D_RTRL' else {}

    @property
    def contestants(self) -> tuple[str, ...]:
        """Who takes part, in the order in which they are made."""
        free = ('free',) if self.rule == 'D_RTRL' else ()
        carrying = ('upstream', 'traceops') if self.upstream_fits else ()
        return (*carrying, *free, 'bptt', 'forward')

    @property
    def text(self) -> str:
        """The sizes in a few words."""
        mode = ', vmap' if self.vmap else ''
        return f'N={self.n}, T={self.steps}, B={self.batch}{mode}'


CASES = (
    Case('D-RTRL LIF 128', 'lif', 'D_RTRL', 128, 6., 10.),
    Case('D-RTRL LIF 1024', 'lif', 'D_RTRL', 1024, 40., 100., heavy=True),
    Case('D-RTRL ALIF 128 vmap', 'alif', 'D_RTRL', 128, 15., 30., vmap=True),
    Case('D-RTRL ALIF 1024', 'alif', 'D_RTRL', 1024, 60., 150., heavy=True),
    Case('D-RTRL GRU 128', 'gru', 'D_RTRL', 128, 6., 9.),
    Case('D-RTRL LSTM 64', 'lstm', 'D_RTRL', 64, 4., 5., steps=30, batch=16),
    Case('ES-D-RTRL LIF 128', 'lif', 'ES_D_RTRL', 128, 1.3),
    Case('ES-D-RTRL two-layer ALIF 128 vmap', 'two-alif', 'ES_D_RTRL', 128, 1.3, vmap=True),
    Case('ES-D-RTRL GRU 128', 'gru', 'ES_D_RTRL', 128, 1.0),
    Case('ES-D-RTRL LIF 2048', 'lif', 'ES_D_RTRL', 2048, 1.9, steps=200, batch=8, heavy=True),
    Case('D-RTRL LIF 8192', 'lif', 'D_RTRL', 8192, None, steps=20, upstream_fits=False,
         check_batch=1, memory_bar=4 * 2 ** 30, heavy=True),
)

#: Of the plots: time against N, time and memory against T (windows of 50 steps).
SWEEPS = {
    'n': tuple(Case(f'N={n}', 'lif', 'D_RTRL', n, None) for n in (32, 64, 128, 256, 512)),
    'steps': tuple(Case(f'T={t}', 'lif', 'D_RTRL', 128, None, steps=t, window=50)
                   for t in (50, 100, 200, 400, 800)),
}
