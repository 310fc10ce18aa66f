# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The proofs need an environment of their own, and those by Triton's interpreter a process."""

import importlib.util
import os

import pytest

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def _missing(item):
    """Why a test cannot run in this process, or ``None``."""
    for package in ('triton', 'jax_triton', 'jax_cuda13_plugin'):
        if importlib.util.find_spec(package) is None:
            return f'{package} is not installed: make test-gpufree'
    if INTERPRETED != (item.path.name == 'test_interpreter.py'):
        return ('triton is interpreted in this process' if INTERPRETED else
                'needs a process in which triton is interpreted') + ': make test-gpufree'
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        reason = _missing(item) if item.path.parent.name == 'gpufree' else None
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    """The table: what each proof found."""
    rows = [value for reports in terminalreporter.stats.values() for report in reports
            if getattr(report, 'when', None) == 'call'
            for name, value in report.user_properties if name == 'proof']
    if rows:
        terminalreporter.section('proofs without a GPU')
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            terminalreporter.write_line('  '.join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@pytest.fixture
def proof(record_property):
    """``proof(what, where, found)``: a line of the table."""
    return lambda *cells: record_property('proof', tuple(map(str, cells)))
