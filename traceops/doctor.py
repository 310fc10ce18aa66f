# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops doctor``: is everything in order on this machine?"""

from __future__ import annotations

import argparse
import dataclasses
import mmap
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from importlib.machinery import PathFinder

import jax
from rich.table import Table
from tqdm import tqdm

import traceops
from traceops import memory
from traceops.errors import UnsupportedVersionError
from traceops.host import versions
from traceops.status import status
from traceops.text import render

__all__ = ['Check', 'check_command', 'check_devices', 'check_import_name', 'check_measurements',
           'check_operations', 'check_pages', 'check_parity', 'check_reuse', 'check_versions',
           'main']

OURS = 'braintrace-traceops'
_REPORT = 'report this, with all that traceops doctor printed'


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding; ``advice`` says what can be done about it."""

    name: str
    passed: bool
    found: str
    advice: str = ''


def check_versions(found: Mapping[str, str | None] | None = None) -> Check:
    """braintrace and jax are in the supported range."""
    try:
        versions.check(found)
    except UnsupportedVersionError as err:
        found_text, _, advice = str(err).partition(' Install ')
        return Check('versions', False, found_text, f'install {advice}')
    from traceops.host import upstream
    missed = '' if upstream.TRAINS_READOUTS else (
        "; with vjp_method='single-step' this braintrace returns a zero gradient for a parameter "
        'that no hidden state follows, such as a plain Linear readout (explain names them)')
    return Check('versions', True, f'braintrace and jax are in the supported range{missed}',
                 'give the readout a state (braintrace.nn.LeakyRateReadout), or install '
                 "'braintrace>=0.2.8'" if missed else '')


def check_import_name(owners: Iterable[str] | None = None) -> Check:
    """The import name ``traceops`` has one owner: this distribution."""
    if owners is None:
        first = PathFinder.find_spec('traceops')
        if first is not None and first.origin not in (None, traceops.__file__):
            return Check('import name', False, f'import traceops gives {first.origin}, which is '
                         f'first on the path', 'rename it, or take its folder off the path')
        owners = metadata.packages_distributions().get('traceops', [])
    return _one_owner('import name', owners)


def check_command(owners: Iterable[str] | None = None) -> Check:
    """So has the command ``traceops`` (PyPI's unrelated ``traceops`` has one of that name)."""
    if owners is None:
        scripts = metadata.entry_points(group='console_scripts', name='traceops')
        owners = [script.dist.name for script in scripts if script.dist is not None]
    return _one_owner('command', owners)


def _one_owner(what: str, owners: Iterable[str]) -> Check:
    names = {owner.lower().replace('_', '-') for owner in owners}
    others = ' '.join(sorted(names - {OURS}))
    if others:
        return Check(what, False, f'{others} installs a traceops too',
                     f'pip uninstall {others}; pip install --force-reinstall --no-deps {OURS}')
    if not names:
        return Check(what, False, f'{OURS} is not installed; traceops comes from '
                     f'{pathlib.Path(traceops.__file__).parent}', f'pip install {OURS}')
    return Check(what, True, f'traceops is that of {OURS}')


def check_devices(nvidia: bool | None = None) -> Check:
    """jax starts, and sees the NVIDIA GPU if there is one."""
    try:
        platforms = sorted({device.platform for device in jax.devices()})
    except RuntimeError as err:
        return Check('devices', False, f'jax cannot start: {err}',
                     'set JAX_PLATFORMS=cpu, or install the jax of the platform that it names')
    if nvidia is None:
        nvidia = pathlib.Path('/proc/driver/nvidia/version').exists()
    missed = nvidia and platforms == ['cpu']
    return Check('devices', True, f'jax runs on {", ".join(platforms)}' + (
        '; it does not see the NVIDIA GPU of this machine' if missed else ''),
        f"pip install '{OURS}[gpu]' brings the jax that does" if missed else '')


def check_pages(enabled: str | None = None, libc: tuple[str, str] | None = None,
                environ: Mapping[str, str] = os.environ) -> Check:
    """What new memory costs: a call gives back all but small arrays, and touches them anew."""
    if enabled is None:
        try:
            enabled = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled').read_text()
        except OSError:                         # not Linux, or not told
            enabled = ''
    name, version = platform.libc_ver() if libc is None else libc
    able = name == 'glibc' and tuple(map(int, version.split('.')[:2])) >= (2, 35)
    on = '[always]' in enabled or 'hugetlb=1' in environ.get('GLIBC_TUNABLES', '')
    found = f'new memory costs {_cost_of_new_memory():.2f} s a GiB in pages of 4 KiB'
    if on:
        return Check('memory', True, f'{found}; large pages are on')
    helps = able and '[madvise]' in enabled
    return Check('memory', True, found, 'GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment: '
                 'large arrays come in pages of 2 MiB' if helps else '')


def check_reuse(able: bool | None = None) -> Check:
    """How many pages are touched anew, and with ``reuse_memory`` (of another process)."""
    if not (memory.able() if able is None else able):
        return Check('page faults', True, 'reuse_memory is for glibc, which this Python is not of')
    without, kept = subprocess.run([sys.executable, memory.__file__], check=True, text=True,
                                   stdout=subprocess.PIPE).stdout.split()
    return Check('page faults', True, f'{without} for an array of 64 MiB that is allocated, '
                 f'filled and freed; {kept} with reuse_memory',
                 'traceops.configure(reuse_memory=True) keeps freed memory for the next call'
                 if int(kept) < int(without) else '')


def _cost_of_new_memory(size: int = 2 ** 26) -> float:
    """Seconds a GiB that touching memory takes the first time more than the second."""
    with mmap.mmap(-1, size) as memory:
        if hasattr(mmap, 'MADV_NOHUGEPAGE'):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            memory[::mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
            times.append(time.perf_counter() - start)
    return max(times[0] - times[1], 0.) * 2 ** 30 / size


def check_compiler() -> Check:
    """jaxlib compiles a trace of six states right; what braintrace trains is not its matter."""
    from traceops.host import faults
    wrong = faults.miscompiles()
    return Check('compiler', True, faults.FUSION.partition(' Set ')[0] if wrong else
                 'traces of six states and more are compiled right',
                 'set XLA_FLAGS=--xla_cpu_use_fusion_emitters=false, or install another jaxlib'
                 if wrong else '')


def check_parity(rule: str, vmap: bool) -> Check:
    """A small spiking net gets upstream's gradients."""
    name = f'{rule}, {"vmap" if vmap else "batch"}'
    try:
        from traceops.benchmarks.cases import Case
        from traceops.benchmarks.measure import run
        # the engine, where upstream is as fast too; on a GPU products are in tf32 by default
        with traceops.configured(window=20), jax.default_matmul_precision('highest'):
            row = run(Case(name, 'lif', rule, 64, None, steps=20, batch=8, vmap=vmap), repeats=1,
                      progress=False, programs=False, names=('upstream', 'traceops'))
    except Exception as err:                    # whatever it is, it is a finding
        return Check(name, False, f'{type(err).__name__}: {err}', _REPORT)
    if row.error:
        return Check(name, False, row.error, _REPORT)
    return Check(name, True, f'largest gradient difference {row.difference:.1e}, '
                 f'{row.spikes:.1f} spikes a neuron, upstream / traceops '
                 f'{row.ratio("upstream", "traceops"):.1f}')


def check_operations() -> tuple[Check, str]:
    """On a GPU: every kernel against its reference, timed against XLA and the limit; a table."""
    try:
        from traceops.benchmarks import operations
        rows = operations.run()
    except Exception as err:                    # whatever it is, it is a finding
        return Check('kernels', False, f'{type(err).__name__}: {err}', _REPORT), ''
    wrong = [row.name for row in rows if not row.right]
    found = f'wrong: {", ".join(wrong)}' if wrong else 'each computes what its reference does'
    return Check('kernels', not wrong, found, _REPORT if wrong else ''), operations.table(rows)


def check_measurements(kind: str) -> Check:
    """What ``traceops tune`` kept of a device can be read, where there is something."""
    from traceops.ops import measured
    ignored = measured.problem(kind)
    if ignored:
        return Check('measurements', True, ignored, 'delete it, or run traceops tune again')
    found = measured.known(kind)
    if not found:
        return Check('measurements', True, 'none of this device: tables choose the simulation',
                     'traceops tune measures it, once')
    kernels = sum(one.backend == 'triton' for one in found.values())
    return Check('measurements', True, f'{len(found)} of this device, the kernel in {kernels}: '
                 f'{measured.file_of(kind)}')


def _parity_checks() -> Iterator[Callable[[], Check]]:
    for rule in ('D_RTRL', 'ES_D_RTRL'):
        for vmap in (False, True):
            yield lambda r=rule, v=vmap: check_parity(r, v)  # type: ignore[misc]


def main(argv: list[str] | None = None) -> int:
    """Run every check and print what it found; exit status 1 when one failed."""
    argparse.ArgumentParser(
        prog='traceops doctor', description='Versions, devices, names, and a parity check.'
    ).parse_args([] if argv is None else argv)
    start = time.perf_counter()
    print(status(), end='\n\n')
    checks = [check_versions(), check_devices(), check_import_name(), check_command(),
              check_pages(), check_reuse()]
    if checks[0].passed and checks[1].passed:   # else upstream cannot be compared with
        checks.append(check_compiler())
        checks += [check() for check in tqdm([*_parity_checks()], desc='gradients', leave=False)]
    timings = ''
    if checks[1].passed and jax.default_backend() == 'gpu':
        from traceops.ops import choice
        kernels, timings = check_operations()
        checks += [kernels, check_measurements(choice.cuda_place().kind)]
    table = Table(title='traceops doctor', title_justify='left')
    for name in ('check', 'result', 'found', 'advice'):
        table.add_column(name, overflow='fold')
    for check in checks:
        table.add_row(check.name, 'ok' if check.passed else 'FAILED', check.found, check.advice)
    print(render(table))
    if checks[1].passed:
        from traceops import ops
        print(ops.report())             # which backend each operation has, here and on a GPU
        print(timings, end='')
    failed = sum(not check.passed for check in checks)
    print(f'{failed or "none"} of {len(checks)} checks failed '
          f'({time.perf_counter() - start:.0f} s)')
    return 1 if failed else 0
