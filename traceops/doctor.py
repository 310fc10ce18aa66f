# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops doctor``: is everything in order on this machine?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from rich.table import Table

from traceops.errors import UnsupportedVersionError
from traceops.host import versions
from traceops.status import status
from traceops.text import render

__all__ = ['Check', 'check_owner', 'check_parity', 'check_versions', 'main']

OURS = 'braintrace-traceops'


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    passed: bool
    found: str
    advice: str = ''


def check_versions(found: Mapping[str, str | None] | None = None) -> Check:
    """braintrace and jax are in the supported range."""
    try:
        versions.check(found)
    except UnsupportedVersionError as err:
        return Check('versions', False, str(err), 'install the versions named')
    return Check('versions', True, 'braintrace and jax are in the supported range')


def check_owner(owners: Sequence[str] | None = None) -> Check:
    """No other distribution owns the import name ``traceops`` (PyPI has an unrelated one)."""
    if owners is None:
        owners = metadata.packages_distributions().get('traceops', [])
    others = sorted({o for o in owners if o.lower() != OURS})
    if others:
        return Check('import name', False, f'{", ".join(others)} installs a traceops too',
                     f'pip uninstall {" ".join(others)}; pip install --force-reinstall {OURS}')
    return Check('import name', True, f'traceops belongs to {OURS}')


def check_parity(rule: str, vmap: bool) -> Check:
    """A small spiking net gets upstream's gradients, faster."""
    from traceops.benchmarks.cases import Case
    from traceops.benchmarks.measure import run
    case = Case(f'{rule}{" vmap" if vmap else ""}', 'lif', rule, 64, None, steps=20, batch=8,
                vmap=vmap)
    row = run(case, repeats=3, progress=False)
    if row.error:
        return Check(case.name, False, row.error, 'report this with the output of traceops doctor')
    return Check(case.name, True, f'largest gradient difference {row.difference:.1e}, '
                 f'{row.spikes:.1f} spikes a neuron, upstream / traceops '
                 f'{row.ratio("upstream", "traceops"):.1f}')


def main(argv: list[str] | None = None) -> int:
    """Run every check; the exit status says whether all passed."""
    print(status())
    start = time.perf_counter()
    checks: list[Callable[[], Check]] = [check_versions, check_owner]
    checks += [lambda r=r, v=v: check_parity(r, v)  # type: ignore[misc]
               for r in ('D_RTRL', 'ES_D_RTRL') for v in (False, True)]
    results = []
    for check in checks:
        results.append(check())
        if not results[-1].passed and check is check_versions:
            break
    table = Table(title='traceops doctor', title_justify='left')
    for name in ('check', 'result', 'found', 'advice'):
        table.add_column(name, overflow='fold')
    for c in results:
        table.add_row(c.name, 'ok' if c.passed else 'FAILED', c.found, c.advice)
    print(render(table))
    print(_device_advice(), f'({time.perf_counter() - start:.0f} s)', sep='\n')
    return 0 if all(c.passed for c in results) else 1


def _device_advice() -> str:
    import jax
    kinds: set[Any] = {d.platform for d in jax.devices()}
    if kinds == {'cpu'}:
        return 'no accelerator is visible to jax: the window engine runs in XLA on the CPU.'
    return f'jax sees {", ".join(sorted(kinds))}: the window engine runs there through XLA.'
