# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Each kernel is tried once a process and device against its reference before it is used.

No kernel has met every device; a wrong gradient must not be how a user finds out. The check
takes milliseconds beside the compilation, and ``TRACEOPS_CHECK_KERNELS=0`` switches it off.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

__all__ = ['TOLERANCE', 'Verdict', 'forget', 'remember', 'verdict', 'verdicts']

#: Relative difference by norm that a float32 kernel may show.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Outcome of a check; ``passed`` is ``None`` where there was none."""

    passed: bool | None
    detail: str


_NOTHING: Mapping[str, Any] = {}
_lock = threading.RLock()
_known: dict[tuple[str, str, str], Verdict] = {}


def verdicts() -> dict[tuple[str, str, str], Verdict]:
    """What is known, by operation, platform and device."""
    return dict(_known)


def remember(operation: Any, where: Any, found: Verdict,
             params: Mapping[str, Any] = _NOTHING) -> None:
    """Note an outcome for the rest of the process."""
    with _lock:
        _known[_kernel(operation, params), where.platform, where.kind] = found


def _kernel(operation: Any, params: Mapping[str, Any]) -> str:
    """The name of a kernel: of an operation with several, which."""
    if operation.variant is None or not params:
        return str(operation.name)
    return f'{operation.name}.{operation.variant(**params)}'


def forget() -> None:
    """Forget every outcome: programs made from now on check again."""
    with _lock:
        _known.clear()


def verdict(operation: Any, where: Any, operands: Sequence[Any] = (),
            params: Mapping[str, Any] = _NOTHING) -> Verdict:
    """The outcome of the check of a kernel on a device; runs it if it has not run."""
    if os.environ.get('TRACEOPS_CHECK_KERNELS') == '0':
        return Verdict(None, 'not checked: TRACEOPS_CHECK_KERNELS=0')
    if not where.present:
        return Verdict(None, 'not checked: no such device in this machine')
    key = _kernel(operation, params), where.platform, where.kind
    with _lock:
        if key not in _known:
            # a thread of its own: the caller may be in the middle of tracing or lowering
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                _known[key] = pool.submit(_check, operation, where, operands, params).result()
        return _known[key]


def _check(operation: Any, where: Any, given: Sequence[Any],
           params_given: Mapping[str, Any]) -> Verdict:
    device = jax.devices('cuda' if where.platform == 'cuda' else 'cpu')[0]
    if operation.trial is not None and given:
        try:
            return Verdict(*operation.trial(operation, given, dict(params_given), device))
        except Exception as err:
            return _failed(err)
    worst = 0.
    for operands, params in operation.cases():
        operands = [jax.device_put(a, device) for a in operands]
        call = functools.partial(operation.primitive.bind, devices=None, **params)
        want = jax.jit(functools.partial(call, request='jax'))(*operands)
        try:
            got = jax.jit(functools.partial(call, request='triton'))(*operands)
            # not max(): it would pass over NaN
            worst = float(np.max([worst, *map(_difference, got, want)]))
        except Exception as err:
            return _failed(err)
    if not worst <= TOLERANCE:
        return Verdict(False, f'it differs from the reference by {worst:.1e} on a small case '
                              f'(at most {TOLERANCE:.0e} is rounding)')
    return Verdict(True, f'checked on this device, difference {worst:.0e}')


def _failed(err: Exception) -> Verdict:
    first = (str(err).strip().splitlines() or [''])[0]
    return Verdict(False, f'it failed on a small case: {type(err).__name__}: {first}')


def _difference(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-30))
