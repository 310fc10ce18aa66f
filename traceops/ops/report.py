# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Which backend each operation has here, and why: for ``status``, ``doctor``, and the curious."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from rich.markup import escape
from rich.table import Table

from traceops.ops import choice, traps, verify
from traceops.ops.primitive import OPERATIONS
from traceops.text import render

__all__ = ['OperationReport', 'Report', 'report', 'why']


@dataclasses.dataclass(frozen=True)
class OperationReport:
    """One operation: the backend here and on an NVIDIA GPU, and why."""

    name: str
    primitive: str
    backend: str
    reason: str
    on_gpu: str
    gpu_reason: str
    check: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`report` found; ``str()`` is a table, :meth:`to_dict` is for machines."""

    platform: str
    request: str
    rows: tuple[OperationReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        table = Table(title=f'traceops operations on {self.platform} '
                            f'(backend: {self.request})', title_justify='left')
        for name in ('operation', 'here', 'why', 'on a GPU', 'why', 'check'):
            table.add_column(name, overflow='fold')
        for row in self.rows:
            table.add_row(*map(escape, (row.name, row.backend, row.reason, row.on_gpu,
                                        row.gpu_reason, row.check)))
        return render(table)


def _here() -> choice.Place:
    if jax.default_backend() == 'gpu':
        return choice.cuda_place()
    return choice.current_place()


def why(operation: str, *operands: Any, backend: str | None = None,
        **params: Any) -> choice.Decision:
    """The backend that an operation would have here for these operands, and why.

    Parameters
    ----------
    operation : str
        ``'adjoint_window'``, ``'es_trace_window'``, ``'d_trace_window'``, ``'trace_gradient'``,
        ``'simulate_window'`` or ``'sparse_trace_gradient'``.
    *operands : array or jax.ShapeDtypeStruct
        In the order of the primitive; without any, an example stands in.
    backend : str, optional
        As in the call.
    **params
        Of the primitive (e.g. ``kappa=None``).

    Returns
    -------
    Decision
        ``.backend`` and ``.reason``.
    """
    if operation not in OPERATIONS:
        raise ValueError(f'there is no operation {operation!r}; there are '
                         f"{', '.join(map(repr, OPERATIONS))}.")
    op = OPERATIONS[operation]
    if not operands:
        operands, params = op.cases()[0]
    return choice.decide(op, operands, params, choice.requested(backend), _here())


def report() -> Report:
    """Of every operation: its backend here, its backend on an NVIDIA GPU, and why.

    Returns
    -------
    Report
        ``print`` it, or read ``.rows``.
    """
    here, request = _here(), choice.requested()
    rows = []
    for op in OPERATIONS.values():
        operands, params = op.cases()[0]
        try:
            found = choice.decide(op, operands, params, request, here)
        except choice.BackendError as err:
            found = choice.Decision('none', str(err))
        gpu = _on_gpu(op, operands, params, here, found)
        rows.append(OperationReport(
            op.name, op.primitive.name, found.backend, found.reason, gpu.backend, gpu.reason,
            _check_of(op)))
    return Report(here.kind or here.platform, request, tuple(rows))


def _on_gpu(op: Any, operands: Any, params: Any, here: choice.Place,
            found: choice.Decision) -> choice.Decision:
    if here.platform == 'cuda':
        return found
    plan = op.kernel(*operands, capability=90, **params)
    if isinstance(plan, str):
        return choice.Decision('jax', plan)
    if plan.rather:
        return choice.Decision('jax', plan.rather)
    missing = traps.problem(90)
    if missing is not None and 'not installed' in missing:
        return choice.Decision('triton', f'would be used; {missing}')
    return choice.Decision('triton', 'kernel, checked on first use')


def _check_of(op: Any) -> str:
    found = [f'{kind}: {"passed" if v.passed else "FAILED"}, {v.detail}'
             for (name, _, kind), v in verify.verdicts().items()
             if name.split('.')[0] == op.name]
    return '; '.join(found) or 'not run'
