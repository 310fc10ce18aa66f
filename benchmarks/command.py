# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line of ``traceops bench``."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax

from traceops.benchmarks import curves, loops, report, sparse, user_programs
from traceops.benchmarks.cases import CASES, Case
from traceops.benchmarks.measure import run

__all__ = ['main']


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='traceops bench', description=__doc__)
    parser.add_argument('--cases', nargs='+', default=['*'], metavar='GLOB',
                        help="e.g. 'ES*' '*LIF 128*'")
    parser.add_argument('--repeats', type=int, default=5, help='rounds, at least (default 5)')
    parser.add_argument('--json', type=pathlib.Path, metavar='PATH', help='write the figures')
    parser.add_argument('--markdown', type=pathlib.Path, metavar='PATH', help='write the table')
    parser.add_argument('--plots', type=pathlib.Path, metavar='DIR',
                        help='sweep over N and T as well, and write PNG plots')
    parser.add_argument('--operations', action='store_true',
                        help='not nets, but every operation of traceops.ops: XLA and kernel')
    parser.add_argument('--tiles', nargs='?', const='', metavar='NAME',
                        help='on a GPU: operations (of that name) with other launch tables')
    parser.add_argument('--loops', action='store_true',
                        help='measure hand-written training loops instead')
    parser.add_argument('--programs', action='store_true',
                        help='measure training programs as people write them instead')
    parser.add_argument('--curves', action='store_true',
                        help='small ES-D-RTRL nets over N, B and T: fails where upstream is faster')
    parser.add_argument('--sparse', action='store_true',
                        help='connectomes, frozen beside what is trained, and trained synapses')
    parser.add_argument('--neurons', nargs='+', type=int, default=[10_000], metavar='N',
                        help=f'of the flies of --sparse (default 10000; the whole brain is '
                             f'{sparse.FLY}: gigabytes, and minutes)')
    parser.add_argument('--peers', action='store_true',
                        help='the same net by BPTT in other libraries, where they are installed')
    parser.add_argument('--against', type=pathlib.Path, metavar='FILE',
                        help='say what got slower than in FILE, which --json wrote')
    parser.add_argument('--no-compile-time', action='store_true',
                        help='compile once: leaves a column out, and takes half the time')
    parser.add_argument('--list', action='store_true', help='name the cases')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when a gradient check failed, or a row got slower than ``--against`` says."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.plots and (args.loops or args.operations):
        parser.error('--plots draws nets: leave out --loops and --operations')
    own = [name for name in ('programs', 'curves', 'sparse') if getattr(args, name)]
    if own and (args.loops or args.operations or args.plots or args.peers or args.against
                or args.tiles is not None or own[1:]):
        parser.error(f'--{own[0]} is a table of its own: leave out --loops, --operations, '
                     f'--plots, --peers, --against, --tiles{"".join(f", --{o}" for o in own[1:])}')
    if args.operations and (args.loops or args.markdown):
        parser.error('--operations prints a table and writes --json: leave out --loops, --markdown')
    if jax.default_backend() == 'gpu':      # else gradients are compared in tf32
        jax.config.update('jax_default_matmul_precision', 'highest')
    if args.against and (args.loops or args.operations or args.peers or args.tiles is not None):
        parser.error('--against compares nets: leave out --loops, --operations, --peers, --tiles')
    if args.loops:
        return _loops(args, loops, 'loop', 'loops', loops.CASES)
    if args.programs:
        return _loops(args, user_programs, 'program', 'programs', user_programs.PROGRAMS)
    if args.curves:
        return _loops(args, curves, 'place', 'curves', curves.PROGRAMS)
    if args.sparse:
        return _loops(args, sparse, 'net', 'sparse', sparse.cases(args.neurons))
    if args.peers:
        return _peers(args)
    cases = _chosen(CASES, args)
    if args.list:
        print('\n'.join(c.name for c in cases))
        return 0
    if not cases:
        print(f'no case matches {" ".join(args.cases)!r}; known: '
              f'{", ".join(c.name for c in CASES)}', file=sys.stderr)
        return 2
    print(report.machine_text())
    if args.tiles is not None:
        from traceops.benchmarks import tiles
        if jax.default_backend() != 'gpu':
            print(f'--tiles times kernels on a GPU, and jax runs on {jax.default_backend()}; '
                  'what it sees, `traceops doctor` says', file=sys.stderr)
            return 2
        print(tiles.table(tiles.run(args.tiles, args.repeats)))
        return 0
    if args.operations:
        return _operations(args)
    rows = []
    for case in cases:
        figures = _alone(case, args) if len(cases) > 1 else report.figures(
            run(case, args.repeats, programs=not args.no_compile_time))
        rows.append(figures)
        print(report.line(figures), flush=True)
    print(report.table(rows))
    print(report.summary(rows))
    data = {'machine': report.machine(), 'rows': rows}
    if args.plots:
        from traceops.benchmarks import plots
        data['sweep'] = plots.main(args.plots, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(data, indent=2) + '\n')
    if args.markdown:
        args.markdown.write_text(report.markdown(rows))
    slower = []
    if args.against:
        slower = report.slower(data, json.loads(args.against.read_text()))
        print('\n'.join(slower) or f'nothing got slower than in {args.against}')
    return 1 if slower or any(r['error'] for r in rows) else 0


def _chosen(cases: Sequence[Any], args: argparse.Namespace) -> list[Any]:
    return [c for c in cases if any(fnmatch.fnmatch(c.name, glob) for glob in args.cases)]


def _peers(args: argparse.Namespace) -> int:
    from traceops.benchmarks import peers
    cases = _chosen(peers.CASES, args)
    if args.list or not cases:
        print('\n'.join(c.name for c in peers.CASES))
        return 0 if args.list else 2
    print(report.machine_text())
    rows: list[dict[str, Any]] = []
    for case in cases:
        found = peers.run(case, args.repeats)
        print(peers.markdown(found), flush=True)
        rows += found
    if args.json:
        args.json.write_text(json.dumps({'machine': report.machine(), 'peers': rows}, indent=2)
                             + '\n')
    if args.markdown:
        args.markdown.write_text(report.machine_text() + '.\n\n' + peers.markdown(rows))
    return 0


def _loops(args: argparse.Namespace, table: Any, what: str, key: str,
           known: Sequence[Any]) -> int:
    """A table of ``loops``, ``user_programs``, ``curves`` or ``sparse``."""
    cases = _chosen(known, args)
    if not cases:
        print(f'no {what} matches {" ".join(args.cases)!r}; known: '
              f'{", ".join(c.name for c in known)}', file=sys.stderr)
        return 2
    if args.list:
        print('\n'.join(c.name for c in cases))
        return 0
    rows = table.main(cases, args.repeats)
    if args.json:
        args.json.write_text(json.dumps({'machine': report.machine(), key: rows}, indent=2)
                             + '\n')
    if args.markdown:
        args.markdown.write_text(table.markdown(rows))
    failed = any(row['error'] for row in rows) or table is curves and curves.cliffs(rows)
    return 1 if failed else 0


def _alone(case: Case, args: argparse.Namespace) -> dict:
    """A case in a process of its own, so that its peak memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'row.json'
        code = subprocess.run(
            [sys.executable, '-W', 'ignore', '-m', 'traceops', 'bench', '--cases', case.name,
             '--repeats', str(args.repeats), '--json', str(path),
             *['--no-compile-time'] * args.no_compile_time], stdout=subprocess.PIPE, text=True)
        if not path.exists():
            return report.failed(case, f'the process ended with status {code.returncode}')
        return json.loads(path.read_text())['rows'][0]


def _operations(args: argparse.Namespace) -> int:
    from traceops.benchmarks import operations
    rows = operations.run(args.repeats)
    print(operations.table(rows))
    if args.json:
        data = {'machine': report.machine(), 'rows': [dataclasses.asdict(r) for r in rows]}
        args.json.write_text(json.dumps(data, indent=2) + '\n')
    return 0 if all(row.right for row in rows) else 1
