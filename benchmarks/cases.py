# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What is measured, and the ratios aimed at."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ['CASES', 'PROGRAMS', 'Case', 'ProgramCase']


@dataclasses.dataclass(frozen=True)
class Case:
    """One row. ``bar`` and ``bar_free``: aimed-at upstream / traceops, trace carried or not."""

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
    upstream_fits: bool = True
    drive: float = 20.              # of a spiking net: what an input spike is worth

    @property
    def spiking(self) -> bool:
        return 'lif' in self.net

    @property
    def options(self) -> dict[str, Any]:
        return {'decay_or_rank': 0.99} if self.rule == 'ES_D_RTRL' else {}

    @property
    def trace_bytes(self) -> int:
        """Bytes of upstream's D-RTRL trace of the recurrent layer, one copy."""
        states = 2 if 'alif' in self.net else 1
        return 4 * self.batch * (self.n_in + self.n) * self.n * states


CASES = (
    Case('D-RTRL LIF 128', 'lif', 'D_RTRL', 128, 6., 10.),
    Case('D-RTRL LIF 1024', 'lif', 'D_RTRL', 1024, 40., 100.),
    Case('D-RTRL ALIF 128 vmap', 'alif', 'D_RTRL', 128, 15., 30., vmap=True),
    Case('D-RTRL ALIF 1024', 'alif', 'D_RTRL', 1024, 60., 150.),
    Case('D-RTRL GRU 128', 'gru', 'D_RTRL', 128, 6., 9.),
    Case('D-RTRL LSTM 64', 'lstm', 'D_RTRL', 64, 4., 5., steps=30, batch=16),
    Case('ES-D-RTRL LIF 128', 'lif', 'ES_D_RTRL', 128, 1.3),
    Case('ES-D-RTRL two-layer ALIF 128 vmap', 'two-alif', 'ES_D_RTRL', 128, 1.3, vmap=True),
    Case('ES-D-RTRL GRU 128', 'gru', 'ES_D_RTRL', 128, 1.0),
    Case('ES-D-RTRL LIF 2048', 'lif', 'ES_D_RTRL', 2048, 1.9, steps=200, batch=8),
    Case('D-RTRL LIF 8192', 'lif', 'D_RTRL', 8192, None, None, steps=20, upstream_fits=False,
         drive=200.),
)


@dataclasses.dataclass(frozen=True)
class ProgramCase:
    """A row of ``traceops programs``, and what is aimed at.

    ``kernels``, ``time``: at most so many times those of the simulation; ``bytes``: upstream
    moves at least so many times as many. ``launches``, ``launches_free``: at most so many, with a
    trace that is carried over calls and without; ``launches_alone``: what simulates among them.
    ``compile``: compiling takes at most so many times as long as without kernels of ours.
    ``by_hand``: the whole training step of a loop that is written by hand
    (:mod:`traceops.benchmarks.loops`), optimiser included.
    """

    case: Case
    aims: dict[str, float] = dataclasses.field(default_factory=dict)
    by_hand: bool = False


def _program(name: str, net: str, rule: str, n: int, by_hand: bool = False, vmap: bool = False,
             **aims: float) -> ProgramCase:
    # With 50 inputs XLA for GPUs would pad the weights anew at every step, simulation included.
    case = Case(name, net, rule, n, None, vmap=vmap, n_in=256)
    if case.spiking:
        aims['launches_alone'] = 2.
    return ProgramCase(case, {**aims, 'compile': 1.}, by_hand)


PROGRAMS = (
    _program('ES-D-RTRL LIF 2048', 'lif', 'ES_D_RTRL', 2048, kernels=1.5, time=1.6, bytes=2.,
             launches=50),
    _program('ES-D-RTRL LIF 128', 'lif', 'ES_D_RTRL', 128, kernels=1.5, time=2., bytes=1.,
             launches=45),
    _program('D-RTRL LIF 1024', 'lif', 'D_RTRL', 1024, kernels=1.6, time=2., bytes=20.,
             launches=50, launches_free=40),
    _program('D-RTRL ALIF 1024', 'alif', 'D_RTRL', 1024, kernels=1.8, time=2.5, bytes=60.,
             launches=55, launches_free=45),
    _program('D-RTRL GRU 128', 'gru', 'D_RTRL', 128, launches_free=40, launches_alone=5),
    _program('D-RTRL LSTM 64', 'lstm', 'D_RTRL', 64, launches_free=40),
    _program('ES-D-RTRL two-layer ALIF 128 vmap', 'two-alif', 'ES_D_RTRL', 128, vmap=True,
             launches=60),
    _program('ES-D-RTRL LIF 128, loop by hand', 'lif', 'ES_D_RTRL', 128, by_hand=True, vmap=True,
             launches=50),
    _program('D-RTRL LIF 1024, loop by hand', 'lif', 'D_RTRL', 1024, by_hand=True, vmap=True,
             launches=50),
)
