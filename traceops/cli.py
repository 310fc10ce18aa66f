# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The command ``traceops`` (also ``python -m traceops``)."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import sys
from typing import Any

import traceops

_HERE = pathlib.Path(__file__).parent


def _own_package() -> None:
    """``traceops`` is the package of this file, also where another one is first on the path.

    An editable install finds this module even then, and ``traceops doctor`` is to say so.
    """
    global traceops
    if getattr(traceops, '__file__', None) != str(_HERE / '__init__.py'):
        spec = importlib.util.spec_from_file_location(
            'traceops', _HERE / '__init__.py', submodule_search_locations=[str(_HERE)])
        assert spec is not None and spec.loader is not None
        traceops = sys.modules['traceops'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(traceops)


_own_package()

__all__ = ['factory', 'main']

#: command -> (module whose ``main(options)`` runs it, what it does)
COMMANDS = {
    'demo': ('traceops.demo', 'train a spiking network online on handwritten digits'),
    'bench': ('traceops.benchmarks', 'upstream, traceops, BPTT and simulation in one run'),
    'programs': ('traceops.benchmarks.programs_command',
                 'what training costs as a GPU program'),
    'tune': ('traceops.benchmarks.tune', 'on a GPU, time kernels against XLA, once'),
    'verify': ('traceops.benchmarks.first_day', 'on a GPU, all that it is to be asked, in order'),
    'explain': ('traceops.cli:explain', 'what traceops does with a learner of yours'),
    'doctor': ('traceops.doctor', 'versions, devices, a parity check on this machine'),
    'status': ('traceops.cli:status', 'versions and settings'),
}


def status(argv: list[str]) -> int:
    """``traceops status``."""
    parser = argparse.ArgumentParser(prog='traceops status', description='Versions and settings.')
    parser.add_argument('--json', action='store_true', help='machine-readable')
    _show(traceops.status(), parser.parse_args(argv).json)
    return 0


def explain(argv: list[str]) -> int:
    """``traceops explain MODULE:FACTORY``."""
    parser = argparse.ArgumentParser(
        prog='traceops explain', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Call FACTORY() of MODULE with traceops enabled, and explain the learner\n'
                    'that it returns.',
        epilog='For example, with a file my_net.py in this folder:\n\n'
               '    def learner():\n'
               "        return braintrace.compile(Net(), 'D_RTRL', example_input, batch_size=32)"
               '\n\n    traceops explain my_net:learner')
    parser.add_argument('target', metavar='MODULE:FACTORY')
    parser.add_argument('--json', action='store_true', help='machine-readable')
    args = parser.parse_args(argv)
    make = factory(args.target, parser)
    with traceops.enabled():
        found = make()
        try:
            if found is None:
                raise TypeError('None')
            explanation = traceops.explain(found)
        except (TypeError, ValueError) as err:
            parser.error(f'{args.target} returned no compiled learner: {err}')
    _show(explanation, args.json)
    return 0


def factory(target: str, parser: argparse.ArgumentParser) -> Any:
    """The function that ``MODULE:FACTORY`` names; leaves through the parser where there is none."""
    module_name, _, name = target.partition(':')
    if not module_name or not name or module_name.endswith('.py'):
        parser.error(f'{target!r} is not MODULE:FACTORY; the function make of my_net.py is '
                     f'my_net:make')
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        if err.name is None or not f'{module_name}.'.startswith(f'{err.name}.'):
            raise                               # a module that the user's own imports
        parser.error(f'there is no module {err.name!r} here or on the Python path')
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items()
                     if callable(value) and getattr(value, '__module__', '') == module_name]
        parser.error(f'{module_name} has no function {name!r}; it has: '
                     f'{", ".join(functions) or "none"}')
    try:
        inspect.signature(found).bind()
    except TypeError as err:
        parser.error(f'{target} is called without arguments: {err}; write a function that calls '
                     f'it and returns the learner')
    except ValueError:                          # of a builtin: no signature is known
        pass
    return found


def _show(what: Any, as_json: bool) -> None:
    print(json.dumps(what.to_dict(), indent=2) if as_json else what)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        The exit status: 0 when all went well, 1 when a check failed, 2 for wrong arguments.
    """
    parser = argparse.ArgumentParser(
        prog='traceops', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Online learning with eligibility traces at about the cost of simulating.',
        epilog='commands:\n' + '\n'.join(f'  {name:9}{does}'
                                         for name, (_, does) in COMMANDS.items())
               + '\n\ntraceops COMMAND --help says more.')
    parser.add_argument('--version', action='version', version=f'traceops {traceops.__version__}')
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND')
    parser.add_argument('options', nargs=argparse.REMAINDER, metavar='...')
    args = parser.parse_args(argv)
    module, _, function = COMMANDS[args.command][0].partition(':')
    try:
        run = getattr(importlib.import_module(module), function or 'main')
        return run(args.options)
    except traceops.errors.TraceopsError as err:
        print(f'traceops: {err}', file=sys.stderr)
        return 1
