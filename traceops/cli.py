# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The command ``traceops`` (also ``python -m traceops``)."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys

import traceops

__all__ = ['main']


def _demo(rest: list[str]) -> int:
    from traceops import demo
    return demo.main(rest)


def _bench(rest: list[str]) -> int:
    from traceops import benchmarks
    return benchmarks.main(rest)


def _doctor(rest: list[str]) -> int:
    argparse.ArgumentParser(prog='traceops doctor', description='Check this machine.'
                            ).parse_args(rest)
    from traceops import doctor
    return doctor.main()


def _status(rest: list[str]) -> int:
    parser = argparse.ArgumentParser(prog='traceops status', description='Versions and settings.')
    parser.add_argument('--json', action='store_true', help='machine-readable')
    args = parser.parse_args(rest)
    now = traceops.status()
    print(json.dumps(now.to_dict(), indent=2) if args.json else now)
    return 0


def _explain(rest: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog='traceops explain',
        description='Call FACTORY() with traceops enabled and explain the learner it returns.')
    parser.add_argument('target', metavar='MODULE:FACTORY')
    parser.add_argument('--json', action='store_true', help='machine-readable')
    args = parser.parse_args(rest)
    module, _, factory = args.target.partition(':')
    if not factory:
        parser.error(f'{args.target!r} is not MODULE:FACTORY, e.g. my_model:make_learner')
    sys.path.insert(0, os.getcwd())
    with traceops.enabled():
        learner = getattr(importlib.import_module(module), factory)()
    found = traceops.explain(learner)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0


COMMANDS = {
    'demo': (_demo, 'train a spiking network online on handwritten digits'),
    'bench': (_bench, 'upstream, traceops, BPTT and simulation, checked and timed in one run'),
    'explain': (_explain, 'what traceops does with a learner of yours'),
    'doctor': (_doctor, 'versions, devices, a parity check on this machine'),
    'status': (_status, 'versions and settings'),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='traceops', formatter_class=argparse.RawDescriptionHelpFormatter,
        description=traceops.__doc__.splitlines()[0],
        epilog='\n'.join(f'  {name:9}{text}' for name, (_, text) in COMMANDS.items()))
    parser.add_argument('--version', action='version', version=f'traceops {traceops.__version__}')
    parser.add_argument('command', choices=COMMANDS)
    parser.add_argument('rest', nargs=argparse.REMAINDER, help='options of the command')
    args = parser.parse_args(argv)
    return COMMANDS[args.command][0](args.rest)
