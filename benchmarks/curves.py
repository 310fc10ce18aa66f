# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""CPU time of small ES-D-RTRL nets against upstream, over neurons, samples and steps.

What a window costs beside its steps is the same however small the net: somewhere it could be more
than it saves. A place where it is, is a cliff.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from traceops.benchmarks import report, user_programs
from traceops.benchmarks.cases import Case
from traceops.benchmarks.user_programs import Program, whole

__all__ = ['CLIFF', 'PROGRAMS', 'cliffs', 'main', 'markdown']

#: upstream / traceops below which a place is a cliff: less than 1 by more than noise.
CLIFF = 0.9
#: Multiplications of a simulation up to which a place is measured: seconds a call.
_WORK = 2e10


def _programs() -> tuple[Program, ...]:
    found = []
    for N, B, T in itertools.product((32, 128, 512, 4096), (1, 32, 256), (8, 50, 400, 3200)):
        case = Case(f'N = {N}, B = {B}, T = {T}', 'lif', 'ES_D_RTRL', N, None, steps=T, batch=B)
        work = (case.n + case.n_in) * N * B * T
        if work <= _WORK:
            rounds = 40 if work < _WORK / 100 else 8 if work < _WORK / 10 else 3
            found.append(Program(case.name, case, whole, 1., 'CPU time', rounds=rounds))
    return tuple(found)


PROGRAMS = _programs()


def run(one: Program, repeats: int) -> dict[str, Any]:
    """A row; measured once more, three times as often, where upstream seems to be faster."""
    row = user_programs.run(one, repeats)
    if not row['error'] and row['value'] < one.bar:
        row = user_programs.run(dataclasses.replace(one, rounds=3 * one.rounds), repeats)
    return row


def cliffs(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong: one line for each place where traceops is slower."""
    return [f'{row["name"]}: upstream / traceops {row["value"]:.2f}' for row in rows
            if not row['error'] and row['value'] < CLIFF]


def main(programs: list[Program], repeats: int) -> list[dict[str, Any]]:
    """Measure, print the table and the cliffs, return the figures."""
    rows = report.each(programs, lambda one: run(one, repeats), user_programs.HEAD,
                       user_programs.cells)
    print('\n'.join(cliffs(rows)) or f'no cliff: nowhere below {CLIFF} of upstream')
    return rows


markdown = user_programs.markdown
