# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Notices when upstream moves, and that nobody else reaches into it."""

import importlib
import pathlib
import re

import pytest

import traceops
from tests.parity.harness import start
from tests.parity.nets import NETS
from traceops.errors import UnsupportedVersionError
from traceops.host import upstream

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROOT = pathlib.Path(traceops.__file__).parent


@pytest.mark.parametrize('module', upstream.PRIVATE_NAMES)
def test_every_private_name_is_there(module):
    found = importlib.import_module(module)
    missing = [n for n in upstream.PRIVATE_NAMES[module] if not hasattr(found, n)]
    assert not missing


def test_a_name_that_moved_says_what_is_supported():
    with pytest.raises(UnsupportedVersionError, match=r'supports\s+braintrace'):
        upstream._private('braintrace._op', 'no_such_name')


def test_every_private_name_used_is_in_the_table():
    used = set(re.findall(r"_private\((?:_op|_sequence|\s*'[\w.]+'),\s*'(\w+)'",
                          (ROOT / 'host/upstream.py').read_text()))
    listed = {n for names in upstream.PRIVATE_NAMES.values() for n in names}
    assert used and used == listed


def test_private_upstream_is_touched_in_one_module_only():
    folders = [ROOT, ROOT.parent / 'kernels', ROOT.parent / 'benchmarks']
    reaching = [p.name for folder in folders for p in folder.rglob('*.py')
                if re.search(r'(from|import) (braintrace\._|jax\._src|brainstate\._)',
                             p.read_text())]
    assert reaching == []


def test_derivatives_of_a_graph_are_kept(monkeypatch):
    traced = []

    def rows(group, *values, of=upstream.transition_rows):
        traced.append(group)
        return of(group, *values)
    monkeypatch.setattr(upstream, 'transition_rows', rows)
    run = start(traceops.compile, NETS['alif'], 'd_rtrl', 4)
    groups = run.inner.graph.hidden_groups
    run.grad()
    run.grad()                      # from states of the type that a call leaves
    assert {id(g) for g in traced} == {id(g) for g in groups} and len(groups) == 2
    traced.clear()
    run.grad()
    assert traced == []
