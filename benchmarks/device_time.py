# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a call takes on a GPU, read from the device's own record of its kernels.

A kernel of ten microseconds cannot be timed from the host, where a call takes longer to begin.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ['kernel_seconds', 'microseconds']

#: Floats that fill the largest cache several times.
_FILL = 2 ** 26


def kernel_seconds(fn: Callable[..., Any], *args: Any) -> list[tuple[str, float]]:
    """Every kernel and copy that a call has the GPU run, with its seconds, in order.

    Empty where jax has no GPU or the GPU keeps no record.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(fn(*args))
        found = sorted(pathlib.Path(folder).rglob('*.xplane.pb'))
        record = jax.profiler.ProfileData.from_file(str(found[0])) if found else None
        events = [event for plane in (record.planes if record else ())
                  if plane.name.startswith('/device:GPU') for line in plane.lines
                  if line.name.startswith('Stream') for event in line.events]
        return [(event.name, 1e-9 * event.duration_ns)
                for event in sorted(events, key=lambda event: event.start_ns)]


def microseconds(fn: Callable[..., Any], args: tuple[Any, ...], repeats: int,
                 copies: bool = True) -> float | None:
    """Median of what a call takes on the GPU, its operands not in the cache; None: no record.

    Without ``copies``: but for those that keep an operand which the call writes in place; where
    nobody needs it any more, as in a loop, there are none.
    """
    filled = jnp.zeros(_FILL)
    jax.block_until_ready((fn(*args), _refill(filled)))
    between = {name for name, _ in kernel_seconds(_refill, filled)}

    def rounds() -> None:
        for _ in range(repeats):
            jax.block_until_ready(_refill(filled))
            jax.block_until_ready(fn(*args))

    times: list[float] = []
    for name, seconds in kernel_seconds(rounds):
        if name in between:
            times += [0.] if not times or times[-1] else []
        elif times and (copies or not name.startswith('Memcpy')):
            times[-1] += seconds
    times = [t for t in times if t]
    return 1e6 * float(np.median(times)) if times else None


@jax.jit
def _refill(filled: Any) -> Any:
    return jnp.tan(filled)         # no operation of ours: its kernel has a name of its own
