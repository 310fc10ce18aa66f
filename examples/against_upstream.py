# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a training step costs upstream and with traceops: gradients compared first, then timed."""

import time

import jax
import numpy as np


def difference(a, b):
    """The largest relative difference of a leaf, by norm; a leaf may be zero if it is in both."""
    found = []
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
        if p.any() or q.any():
            found.append(np.linalg.norm(p - q) / max(np.linalg.norm(p), 1e-30))
    if not found:
        raise SystemExit('every gradient is zero: the comparison would prove nothing')
    return float(np.max(found))             # of NaN and numbers this is NaN, which max() may lose


def interleaved(steps, batch, rounds=5):
    """``{name: median seconds}`` of compiled training steps, taken in turns."""
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*batch))
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(taken)) for name, taken in seconds.items()}


def report(theirs, ours, times, steps, unit):
    """Print it, for ``steps`` training steps; no speed is worth a wrong gradient."""
    worst = difference(theirs, ours)
    if not worst <= 1e-5:
        raise SystemExit(f'the gradients differ by {worst:.1e}')
    a, b = (steps * times[name] for name in ('upstream', 'traceops'))
    print(f'gradients:  largest relative difference of a leaf from upstream {worst:.1e}')
    print(f'one {unit}:{" " * (7 - len(unit))}upstream {a:.2f} s, traceops {b:.2f} s: '
          f'{a / b:.3g} times as fast')
