# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line of ``traceops programs``, and its tables."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from rich.markup import escape
from rich.table import Table

from traceops.benchmarks.cases import CASES, PROGRAMS, ProgramCase
from traceops.benchmarks.measure import Training, of_case
from traceops.benchmarks.programs import Program, loop_programs, programs
from traceops.benchmarks.targets import GPUS
from traceops.cli import factory
from traceops.errors import TraceopsError
from traceops.text import render

__all__ = ['figures', 'kernel_table', 'main', 'markdown', 'summary', 'table']

_WHO = {'upstream': 'upstream', 'traceops': 'traceops', 'loop': "backend='jax'",
        'reset': 'traceops, reset', 'free': 'traceops, no carry',
        'alone': 'its simulation', 'forward': 'simulation only'}
#: Of what is aimed at: the program, if it is not the training call, and of what it is told.
_OF = {'launches_free': ('free', 'launches'), 'launches_alone': ('alone', 'launches')}
_HEAD = ('case', 'program', 'kernels', 'MB', 'model us', 'temporary MB',
         'kernels / simulation', 'model time / simulation', 'bytes / simulation',
         'bytes: upstream / this', "compile / backend='jax'")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='traceops programs', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='What training costs as a GPU program, found without a GPU: kernels\n'
                    'launched, bytes moved, XLA\'s model of the time; loops multiplied out.',
        epilog='MODULE:FACTORY is a function of yours that returns a dict:\n\n'
               '    def training():\n'
               '        return dict(model=Net(), algorithm=\'D_RTRL\', inputs=xs,     # [T, ...]\n'
               '                    loss=lambda out: (out ** 2).mean(),\n'
               '                    batch_size=32)        # and other options of compile\n\n'
               '    traceops programs my_net:training')
    parser.add_argument('targets', nargs='*', metavar='CASE | MODULE:FACTORY',
                        help="cases by name or glob (default: all), or a net of yours")
    parser.add_argument('--gpu', default='h100', choices=GPUS, help='default: h100')
    parser.add_argument('--ops', action='store_true', help='a row for every kernel, largest first')
    parser.add_argument('--json', type=pathlib.Path, metavar='PATH', help='write the figures')
    parser.add_argument('--markdown', type=pathlib.Path, metavar='PATH', help='write the table')
    parser.add_argument('--list', action='store_true', help='name the cases')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Compile and print; exit status 2 for a name that is not known."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.list:
        print('\n'.join(row.case.name for row in PROGRAMS))
        return 0
    trainings = _trainings(args.targets, parser)
    rows = []
    for name, (compiled_for, aims) in trainings.items():
        found = compiled_for(args.gpu)
        rows.append(figures(name, args.gpu, found, aims))
        print(table(rows[-1:]), end='', flush=True)
        if args.ops:
            print(*(kernel_table(who, program) for who, program in found.items()), sep='\n')
    print(summary(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + '\n')
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    return 0


def _trainings(names: list[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """``{name: (gpu -> programs, aims)}``."""
    known = {c.name: ProgramCase(c) for c in CASES if c.upstream_fits}
    known |= {row.case.name: row for row in PROGRAMS}
    found: dict[str, Any] = {}
    for name in names or [row.case.name for row in PROGRAMS]:
        if ':' in name:
            make = functools.partial(_of_factory, factory(name, parser))
            found[name] = functools.partial(programs, make, free=True), {}
            continue
        matching = [row for row in known.values() if fnmatch.fnmatch(row.case.name, name)]
        if not matching:
            parser.error(f'no case matches {name!r}; there are {", ".join(map(repr, known))}, and '
                         'MODULE:FACTORY for a net of yours')
        for row in matching:
            found[row.case.name] = _of_row(row), row.aims
    return found


def _of_row(row: ProgramCase) -> Callable[[str], dict[str, Program]]:
    if row.by_hand:
        return functools.partial(loop_programs, row.case)
    return functools.partial(programs, functools.partial(of_case, row.case),
                             free=row.case.rule == 'D_RTRL')


def _of_factory(function: Callable[[], Any]) -> Training:
    """The training that a user's function describes."""
    given = function()
    missing = {'model', 'algorithm', 'inputs', 'loss'} - set(given)
    if missing:
        raise TraceopsError(f'{function.__name__}() returned no {", ".join(sorted(missing))}: it '
                            'returns a dict of model, algorithm, inputs, loss, and options of '
                            'braintrace.compile')
    options = dict(given)
    loss = options.pop('loss')
    return Training(options.pop('model'), options.pop('algorithm'), options.pop('inputs'),
                    lambda out, _: loss(out), options=options)


def figures(name: str, gpu: str, found: dict[str, Program],
            aims: dict[str, float]) -> dict[str, Any]:
    """Everything known of a row, JSON-ready."""
    base, upstream = found['forward'].total, found['upstream'].total
    return {'name': name, 'gpu': gpu, 'aims': aims, 'programs': {who: {
        **dataclasses.asdict(p.total), 'temporary': p.temporary,
        'over_simulation': {'kernels': p.total.launches / base.launches,
                            'time': p.total.microseconds / base.microseconds,
                            'moved': p.total.bytes / base.bytes},
        'bytes_of_upstream': upstream.bytes / p.total.bytes,
        'compile_of_loop': _compile(found) if who == 'traceops' else None,
        'kernels': [dataclasses.asdict(k) for k in _largest(p)],
    } for who, p in found.items()}}


def _compile(found: dict[str, Program]) -> float | None:
    """Of the training call: times that of the one without kernels of ours."""
    ours, loop = (found[who].seconds if who in found else None for who in ('traceops', 'loop'))
    return round(ours / loop, 2) if ours and loop else None


def _largest(program: Program) -> list[Any]:
    return sorted(program.kernels, key=lambda k: -k.times * k.microseconds)


def _aims(figures: dict[str, Any], who: str) -> dict[str, float]:
    """What is aimed at, of one program."""
    of = {name: _OF.get(name, ('traceops', name)) for name in figures['aims']}
    return {key: figures['aims'][name] for name, (whose, key) in of.items() if whose == who}


def _judged(figures: dict[str, Any], who: str) -> dict[str, tuple[float, bool | None]]:
    """Of launches and each ratio: the value, and whether what is aimed at is met."""
    program, aims = figures['programs'][who], _aims(figures, who)
    values = {**program['over_simulation'], 'bytes': program['bytes_of_upstream'],
              'launches': program['launches']}
    if program['compile_of_loop'] is not None:
        values['compile'] = program['compile_of_loop']
    return {key: (value, None if key not in aims else
                  value >= aims[key] if key == 'bytes' else value <= aims[key])
            for key, value in values.items()}


def _cells(figures: dict[str, Any], who: str) -> list[str]:
    program, judged, aims = figures['programs'][who], _judged(figures, who), _aims(figures, who)

    def verdict(key: str) -> str:
        met = judged[key][1]
        return '' if met is None else f' ({"met" if met else "MISSED"} {aims[key]:g})'

    def ratio(key: str) -> str:
        return f'{judged[key][0]:.3g}{verdict(key)}'
    loops = f' and {program["unknown_loops"]} loops' if program['unknown_loops'] else ''
    return [figures['name'] if who == 'upstream' else '', _WHO[who],
            f'{program["launches"]}{loops}{verdict("launches")}', f'{program["bytes"] / 1e6:.1f}',
            f'{program["microseconds"]:.4g}', f'{program["temporary"] / 1e6:.1f}',
            *map(ratio, ('kernels', 'time', 'moved', 'bytes')),
            ratio('compile') if 'compile' in judged else '']


def table(rows: list[dict[str, Any]]) -> str:
    """Of rows for one GPU."""
    out = Table(title=f'compiled for {rows[0]["gpu"]}', title_justify='left')
    for name in _HEAD:
        out.add_column(name, overflow='fold')
    for f in rows:
        for who in f['programs']:
            out.add_row(*_cells(f, who))
    return render(out, width=176)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The same table for a README."""
    lines = ['| ' + ' | '.join(_HEAD) + ' |', '|---' * len(_HEAD) + '|']
    lines += ['| ' + ' | '.join(_cells(f, who)) + ' |' for f in rows for who in f['programs']]
    return '\n'.join(lines) + '\n'


def kernel_table(who: str, program: Program) -> str:
    """A row for every kernel of a program, largest first."""
    out = Table(title=f'{_WHO[who]}: kernels', title_justify='left')
    for name in ('us', 'times', 'kernel', 'read MB', 'written MB', 'time from', 'what'):
        out.add_column(name, overflow='fold')
    for k in _largest(program):
        out.add_row(f'{k.times * k.microseconds:.3g}', str(k.times),
                    k.name if k.operation == 'fusion' else k.operation,
                    f'{k.read / 1e6:.3g}', f'{k.written / 1e6:.3g}',
                    k.basis, escape(k.source[-70:]))
    return render(out, width=160)


_MISSED = {'free': ', no carry', 'alone': ', what simulates'}


def summary(rows: list[dict[str, Any]]) -> str:
    """Which of the aims were met, and how to read the figures."""
    missed = [f'  {f["name"]}{_MISSED.get(who, "")}: {key} {value:.3g}, '
              f'aimed at {_aims(f, who)[key]:g}'
              for f in rows for who in f['programs']
              for key, (value, met) in _judged(f, who).items() if met is False]
    aimed = any(f['aims'] for f in rows)
    head = '\n'.join(['missed:', *missed, '']) if missed else 'every aim met\n' * aimed
    return (f'{head}A model is no timing: it compares programs compiled together. A kernel of '
            "which XLA has no model counts\nits bytes at the device's bandwidth; one of ours "
            'that is a product, its operations at the peak of what\nit multiplies in (dense bf16 '
            'or tf32 tensor cores, float32 units) where those take longer. Neither is\nreached in '
            "full. XLA's model of its own products knows no tensor cores. Compiling is CPU time of "
            'one run each,\nwithout the assembling of kernels of ours, which is done when a '
            'program is loaded.')
