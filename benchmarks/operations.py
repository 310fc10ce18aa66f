# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops bench --operations``: each trace operation, by XLA and by its kernel, and the limit.

The reference in plain JAX is what XLA lowers. Where the operation has a kernel on this device, the
two are compared first and then timed in turn. The limit is every operand read and every result
written once at the bandwidth of the device's memory, or for a product its operations at the peak
of tensor cores, whichever takes longer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.table import Table

from traceops import ops
from traceops.benchmarks.device_time import microseconds
from traceops.benchmarks.measure import interleaved
from traceops.benchmarks.targets import GPUS
from traceops.kernels.trace_gradient.launch import work
from traceops.text import render

__all__ = ['OperationCase', 'OperationRow', 'cases', 'run', 'table']

#: Relative difference by norm of a float32 kernel from the reference; and of one whose operands
#: are rounded to tf32, as XLA's are too, but not to the same of two neighbours.
TOLERANCE, TOLERANCE_TF32 = 1e-5, 1e-3


@dataclasses.dataclass(frozen=True)
class OperationCase:
    """One operation on arrays of one size; ``call(*operands, backend=...)``."""

    name: str
    operation: str
    call: Callable[..., Any]
    operands: tuple[Any, ...]
    exact: Callable[..., Any] | None = None     # the result in float64, where errors are stated
    tolerance: float = TOLERANCE
    work: tuple[int, str] = (0, '')             # operations, and what they are done in

    @property
    def in_place(self) -> bool:
        """Whether a kernel overwrites the first operand."""
        return self.operation == 'd_trace_window'


@dataclasses.dataclass(frozen=True)
class OperationRow:
    """What was measured of a case: medians in microseconds by backend.

    ``difference``: of the kernel from the reference; ``error``: from the result in float64, of
    the kernel where there is one;
    ``use``: the backend to use on this device, ``limit``: microseconds, ``None`` where the
    device is not known; ``tolerance``: that a right kernel keeps.
    """

    name: str
    bytes: int
    microseconds: dict[str, float]
    limit: float | None
    difference: float | None
    error: float | None
    use: str
    reason: str
    tolerance: float = TOLERANCE

    @property
    def right(self) -> bool:
        """Whether the kernel computes what the reference does."""
        return self.difference is None or self.difference <= self.tolerance


def cases(T: int = 50, B: int = 32, N: int = 256) -> Iterator[OperationCase]:
    """Every operation, the forms for one step included, for a layer of ``N`` neurons."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    correction: Any = np.linspace(0.3, 1., T, dtype=np.float32)
    for S in (1, 2):
        L, D, f = draw(T, B, N, S), 0.5 * draw(T, B, N, S, S), draw(T, B, N, S)
        g, e, x = draw(B, N, S), draw(B, N, N, S), draw(T, B, N)
        yield OperationCase(f'adjoint_window S={S}', 'adjoint_window', _adjoint, (L, D, f))
        yield OperationCase(f'es_trace_window S={S}', 'es_trace_window', _es_window,
                            (L, D, f, g, correction))
        yield OperationCase(f'es_trace_update S={S}', 'es_trace_window', _es_update,
                            (L[0], D[0], f[0], g, x[0], x[1]))
        yield OperationCase(f'd_trace_window S={S}', 'd_trace_window', ops.d_trace_window,
                            (e, x, f, D[0], L[0]))
        yield OperationCase(f'd_trace_update S={S}', 'd_trace_window', ops.d_trace_update,
                            (e, x[0], f[0], D[0], L[0]))
    sources = np.sort(rng.integers(0, N, N * N // 20 + 1)).astype(np.int32)      # 5 % of synapses
    targets = rng.integers(0, N, len(sources)).astype(np.int32)
    yield OperationCase('sparse_trace_gradient', 'sparse_trace_gradient',
                        ops.sparse_trace_gradient, (x, draw(T, B, N), sources, targets))
    yield OperationCase('simulate_window LIF', 'simulate_window', _lif,
                        (draw(B, N), draw(T, B, N), draw(N, N) * np.float32(N ** -.5)))
    spikes = (rng.random((T, B, N)) < 0.2).astype(np.float32)
    for precision in ops.PRECISIONS:
        yield OperationCase(f'trace_gradient {precision}', 'trace_gradient',
                            functools.partial(ops.trace_gradient, precision=precision),
                            (spikes, draw(T, B, N)), _product,
                            TOLERANCE_TF32 if precision == 'tf32' else TOLERANCE,
                            work(T * B, N, N, precision))


def _adjoint(L: Any, D: Any, f: Any, backend: str) -> Any:
    return ops.adjoint_window(L, D, [f], backend=backend)


def _es_window(L: Any, D: Any, f: Any, g: Any, correction: Any, backend: str) -> Any:
    return ops.es_trace_window(L, D, f, g, decay_x=.9, decay_f=.9, correction=correction,
                               backend=backend)


def _es_update(L: Any, D: Any, f: Any, g: Any, x: Any, a: Any, backend: str) -> Any:
    return ops.es_trace_update(L, D, f, g, decay_f=.9, decay_x=.9, inputs=x, input_carry=a,
                               backend=backend)


def _lif(first: Any, inputs: Any, weights: Any, backend: str) -> Any:
    """Spikes that are few: the threshold is far from the inputs."""
    def step(constants: Any, slices: Any, states: Any) -> Any:
        (W,), (x,), (V,) = constants, slices, states
        spikes = (V >= 2.).astype(V.dtype)
        V = .9 * (V - spikes) + .5 * x + jax.numpy.matmul(spikes, W, precision='highest')
        return [V], [V]
    return ops.simulate_window(step, [weights], [inputs], [first], backend=backend)


def _product(x: Any, delta: Any) -> Any:
    rows = [a.reshape(-1, a.shape[-1]).astype(np.float64) for a in (x, delta)]
    return rows[0].T @ rows[1]


def run(repeats: int = 5, N: int | None = None, T: int = 50, B: int = 32) -> list[OperationRow]:
    """Compare and time every case here; ``N`` is 1024 on a GPU, else 256."""
    if N is None:
        N = 1024 if jax.default_backend() == 'gpu' else 256
    return [_row(case, repeats) for case in cases(T, B, N)]


def _row(case: OperationCase, repeats: int) -> OperationRow:
    found = ops.why(case.operation, backend='auto')
    backends = ('jax', 'triton') if found.backend == 'triton' else ('jax',)
    operands = tuple(map(jax.device_put, case.operands))
    fns = {b: jax.jit(functools.partial(case.call, backend=b)) for b in backends}
    results = {b: jax.tree.leaves(fn(*operands)) for b, fn in fns.items()}
    touched = sum(a.nbytes for a in (*operands, *results['jax']))
    difference = _difference(results['triton'], results['jax']) if 'triton' in fns else None
    error = None if case.exact is None else _difference(
        results[backends[-1]], [case.exact(*case.operands)])
    del results
    times = _times(case, fns, operands, repeats)
    wrong = difference is not None and not difference <= case.tolerance
    best = min(times, key=lambda b: times[b])
    reason = found.reason if len(times) == 1 else (
        f'the kernel is wrong by {difference:.1e}: report this' if wrong else
        f'{max(times.values()) / times[best]:.2f} times faster')
    return OperationRow(case.name, touched, times,
                        _limit(jax.devices()[0].device_kind, touched, *case.work), difference,
                        error, 'jax' if wrong else best, reason, case.tolerance)


def _times(case: OperationCase, fns: dict[str, Any], operands: tuple[Any, ...],
           repeats: int) -> dict[str, float]:
    """Microseconds by backend: on a GPU of its kernels, else of the call."""
    on_gpu = {b: microseconds(fn, operands, repeats, not case.in_place) for b, fn in fns.items()
              if jax.default_backend() == 'gpu'}
    if on_gpu and all(on_gpu.values()):
        return {b: t for b, t in on_gpu.items() if t is not None}
    return {b: 1e6 * float(np.median(t))
            for b, t in interleaved(fns, operands, repeats, None).items()}


def _difference(got: list[Any], want: list[Any]) -> float:
    """The largest relative difference of a result, by norm."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64))
             for a, b in zip(got, want, strict=True)]
    # not max(): it would pass over NaN
    return float(np.max([np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30) for a, b in pairs]))


def _limit(kind: str, touched: int, operations: int = 0, unit: str = '') -> float | None:
    """Microseconds on a device that is described, which calls itself ``kind``."""
    gpu = next((g for name, g in GPUS.items() if name.upper() in kind.upper()), None)
    if gpu is None:
        return None
    return 1e6 * max(touched / gpu.bandwidth, operations / gpu.peaks[unit] if operations else 0.)


def table(rows: list[OperationRow]) -> str:
    """The table of a run."""
    out = Table(title=f'trace operations on {jax.devices()[0].device_kind}', title_justify='left')
    for name in ('operation', 'MB', 'XLA us', 'kernel us', 'limit us', 'kernel differs by', 'error',
                 'use', 'why'):
        out.add_column(name, overflow='fold')
    text = lambda value, form: '-' if value is None else format(value, form)  # noqa: E731
    for row in rows:
        out.add_row(row.name, f'{row.bytes / 1e6:.1f}', text(row.microseconds['jax'], '.1f'),
                    text(row.microseconds.get('triton'), '.1f'), text(row.limit, '.1f'),
                    text(row.difference, '.0e'), text(row.error, '.0e'), row.use, row.reason)
    return render(out, width=160)
