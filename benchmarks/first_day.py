# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops verify``: all that is to be asked of a GPU, in order, and one report of it.

Right before quick: the kernels' tests, parity with upstream, and that each kernel gives the same
bits a thousand times come before anything is timed. Every step is a process of its own, whose
output is kept; one that fails does not keep the next from being asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable

from rich.table import Table

from traceops.errors import TraceopsError
from traceops.text import render

__all__ = ['STEPS', 'Outcome', 'Step', 'main', 'report', 'run', 'why_not']


class NoGpuError(TraceopsError, RuntimeError):
    """There is nothing to ask here."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One question.

    Attributes
    ----------
    name : str
    asks : str
        In words.
    command : tuple of str
        After ``python -m``.
    tool : tuple of str
        A program, and its options, that runs Python.
    """

    name: str
    asks: str
    command: tuple[str, ...]
    tool: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """What is run, in words."""
        return ' '.join([*self.tool, 'python', '-m', *self.command])


_PYTEST = ('pytest', '-q', '-p', 'no:cacheprovider')
_REPEATS = 'traceops.benchmarks.repeats'
_SANITIZER = 'compute-sanitizer'
_ONCE = (_REPEATS, 'bits', '--runs', '2', '--size', '64')

STEPS = (
    Step('kernels', 'does each kernel compute its definition?',
         (*_PYTEST, 'tests/ops/test_gpu.py')),
    Step('parity', "are the gradients upstream's?", (*_PYTEST, 'tests/parity')),
    Step('bits', 'are 1000 runs of each kernel the same?', (_REPEATS, 'bits')),
    Step('margins', "does the simulation agree with XLA's loop away from thresholds?",
         (_REPEATS, 'margins')),
    Step('tune', 'which simulations are a kernel here?', ('traceops', 'tune')),
    Step('bench', 'how fast is a call?', ('traceops', 'bench', '--no-compile-time')),
    Step('loops', 'and a loop by hand?', ('traceops', 'bench', '--loops', '--no-compile-time')),
    Step('rates', 'from which rate on is the loop faster?', (_REPEATS, 'rates')),
    Step('tiles', 'are the launch tables right?', ('traceops', 'bench', '--tiles')),
    Step('operations', 'is each operation near its limit?', ('traceops', 'bench', '--operations')),
    *(Step(tool, f'what does {_SANITIZER} say of each kernel?', _ONCE,
           (_SANITIZER, '--error-exitcode', '9', '--tool', tool))
      for tool in ('racecheck', 'memcheck')))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of a step: its exit status (``None``: left out), seconds, and the end of what it printed."""

    step: Step
    status: int | None
    seconds: float
    said: str

    @property
    def result(self) -> str:
        """In a word."""
        return {None: 'left out', 0: 'ok'}.get(self.status, f'FAILED ({self.status})')


def main(argv: list[str] | None = None) -> int:
    """Ask, and write the report; exit status 1 where a step failed or there is no GPU."""
    parser = argparse.ArgumentParser(
        prog='traceops verify', description='On a GPU: kernels, parity, repeats, times, in order; '
        'one report.')
    parser.add_argument('steps', nargs='*', metavar='STEP', help='by name (default: all)')
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('out/verify'),
                        metavar='DIR', help='of the report (default: out/verify)')
    parser.add_argument('--list', action='store_true', help='say what would be run')
    args = parser.parse_args(argv)
    known = {step.name: step for step in STEPS}
    wrong = [name for name in args.steps if name not in known]
    if wrong:
        parser.error(f'there is no step {wrong[0]!r}; there are {", ".join(known)}')
    steps = [step for step in STEPS if not args.steps or step.name in args.steps]
    if args.list:
        print(_table(steps))
        return 0
    device = _device()
    if not device.startswith('gpu'):
        raise NoGpuError(
            f'verify asks a GPU, and jax runs on {device.partition(",")[0]}; nothing was run. '
            'traceops verify --list says what would be; `make test-gpufree` proves the kernels '
            'without a GPU')
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for step in steps:
        print(f'{step.name}: {step.line}', flush=True)
        outcomes.append(run(step, args.out))
        print(f'  {outcomes[-1].result}, {outcomes[-1].seconds:.0f} s', flush=True)
        (args.out / 'report.md').write_text(report(device, outcomes), encoding='utf-8')
    print(f'written to {args.out / "report.md"}')
    return 1 if any(o.status for o in outcomes) else 0


def _table(steps: Iterable[Step]) -> str:
    out = Table(title='traceops verify', title_justify='left')
    for name in ('step', 'asks', 'command'):
        out.add_column(name, overflow='fold')
    for step in steps:
        out.add_row(step.name, step.asks, step.line)
    return render(out, width=140)


def _device() -> str:
    """Platform and kind of the first device, asked in another process: one that has seen a GPU
    keeps most of its memory.
    """
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c',
         'import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep=", ")'],
        stdout=subprocess.PIPE, text=True)
    return done.stdout.strip() or 'nothing'


def why_not(step: Step) -> str:
    """Why a step cannot be run here; empty where it can."""
    if step.tool and shutil.which(step.tool[0]) is None:
        return f'{step.tool[0]} is not installed (it is in the CUDA toolkit)'
    missing = [path for path in step.command if path.startswith('tests/')
               and not pathlib.Path(path).exists()]
    if missing:
        return f'{missing[0]} is in the sources: run this in a checkout'
    return ''


def run(step: Step, folder: pathlib.Path) -> Outcome:
    """Run a step, and keep what it prints in a file of its name."""
    reason = why_not(step)
    if reason:
        return Outcome(step, None, 0., reason)
    start = time.perf_counter()
    path = folder / f'{step.name}.txt'
    with path.open('w', encoding='utf-8') as file:
        status = subprocess.run(
            [*step.tool, sys.executable, '-W', 'ignore', '-m', *step.command], stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}).returncode
    said = path.read_text(encoding='utf-8', errors='replace').splitlines()
    return Outcome(step, status, time.perf_counter() - start, '\n'.join(said[-60:]))


def report(device: str, outcomes: Iterable[Outcome]) -> str:
    """In Markdown: what was asked, how it went, and the end of what each step printed."""
    from importlib import metadata
    outcomes = list(outcomes)
    versions = ', '.join(f'{name} {metadata.version(name)}' for name in (
        'braintrace-traceops', 'braintrace', 'jax'))
    lines = [f'# traceops verify: {device}', '', f'{versions}.', '',
             '| step | asks | result | seconds | command |', '|---|---|---|---|---|',
             *(f'| {o.step.name} | {o.step.asks} | {o.result} | {o.seconds:.0f} | `{o.step.line}` |'
               for o in outcomes)]
    for o in outcomes:
        lines += ['', f'## {o.step.name}', '', '```', o.said, '```']
    return '\n'.join(lines) + '\n'
