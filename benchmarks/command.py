# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line of ``traceops bench``."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from traceops.benchmarks import report
from traceops.benchmarks.cases import CASES, SWEEPS, Case
from traceops.benchmarks.measure import run

__all__ = ['main']

_ABOUT = """\
Upstream, traceops, BPTT and simulation of the same nets in one run: gradients checked first, then
timed interleaved, medians. "No carry" is carry_trace=False; "forward only" learns nothing."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='traceops bench', description=_ABOUT)
    parser.add_argument('--cases', default='*', metavar='GLOB', help="e.g. 'ES*' or '*128*'")
    parser.add_argument('--list', action='store_true', help='name the cases, and stop')
    parser.add_argument('--quick', action='store_true',
                        help='without the rows that take minutes, fewer calls')
    parser.add_argument('--repeats', type=_positive, default=5, metavar='N',
                        help='timed calls of each contestant, at least (default 5; short ones '
                             'get up to 60)')
    parser.add_argument('--sweep', action='store_true',
                        help='instead of the cases: time against N, time and memory against T')
    parser.add_argument('--json', type=_writable, metavar='PATH', help='write all figures')
    parser.add_argument('--markdown', type=_writable, metavar='PATH',
                        help='write the table as the README has it')
    parser.add_argument('--plots', type=pathlib.Path, metavar='DIR',
                        help='write PNG plots (runs the sweeps too)')
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return int(text)


def _writable(text: str) -> pathlib.Path:
    """Known before minutes are spent on what could not be written."""
    path = pathlib.Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f'there is no folder {path.parent}')
    return path


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when a check failed, 2 for wrong arguments."""
    args = _parser().parse_args(argv)
    cases = [c for c in CASES if fnmatch.fnmatch(c.name, args.cases)]
    if args.quick:
        cases = [c for c in cases if not c.heavy]
    if args.list:
        print('\n'.join(f'{c.name:36}{c.text}' for c in cases))
        return 0
    if not cases:
        print(f'no case matches {args.cases!r}{" with --quick" if args.quick else ""}; known: '
              f'{", ".join(c.name for c in CASES)}', file=sys.stderr)
        return 2
    if args.plots and importlib.util.find_spec('matplotlib') is None:
        print("--plots needs matplotlib: pip install 'braintrace-traceops[demo]'", file=sys.stderr)
        return 2
    machine = report.machine()
    _say(report.machine_text(machine), report.busy(machine))
    rows = [] if args.sweep else list(_rows(cases, args))
    if rows:
        _say('', report.tables(rows), report.summary(rows))
    sweeps = _sweeps(args) if args.sweep or args.plots else {}
    if args.json:
        data = {'format': 1, 'machine': machine, 'rows': rows, 'sweeps': sweeps}
        args.json.write_text(json.dumps(data, indent=2, allow_nan=False) + '\n')
    if args.markdown:
        args.markdown.write_text(report.markdown(rows, machine))
    if args.plots:
        from traceops.benchmarks import plots
        _say(*(f'wrote {path}' for path in plots.draw(args.plots, rows, sweeps)))
    everything = [*rows, *(f for sweep in sweeps.values() for f in sweep)]
    return 1 if any(f['error'] for f in everything) else 0


def _say(*lines: str) -> None:
    for text in filter(None, lines):
        print(text, flush=True)


def _rows(cases: list[Case], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row after the other; each in a process of its own, so that its memory is its own."""
    for case in cases:
        if len(cases) == 1:
            yield (figures := _measured(case, args))
        else:
            yield (figures := _alone(case, args))
            print(report.line(figures), flush=True)


def _measured(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    return report.figures(run(case, args.repeats, compiles=1 if args.quick else 3,
                              patience=1.5 if args.quick else 3.))


def _alone(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'row.json'
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-m', 'traceops', 'bench', '--cases', case.name,
             '--repeats', str(args.repeats), '--json', str(path),
             *(['--quick'] if args.quick else [])], stdout=subprocess.DEVNULL)
        if not path.exists():
            return report.failed(case, f'its process ended with status {done.returncode}')
        return json.loads(path.read_text())['rows'][0]


def _sweeps(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    out: dict[str, list[dict[str, Any]]] = {}
    for name, cases in SWEEPS.items():
        out[name] = []
        for case in tqdm(cases, desc=f'sweep over {name}', leave=False):
            figures = report.figures(run(case, args.repeats, progress=False, patience=1.5))
            out[name].append(figures)
            tqdm.write(report.line(figures), file=sys.stdout)
    return out
