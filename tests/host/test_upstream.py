# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Notices when upstream moves, and that nobody else reaches into it."""

import importlib
import pathlib
import re

import pytest

import traceops
from traceops.errors import UnsupportedVersionError
from traceops.host import upstream

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
