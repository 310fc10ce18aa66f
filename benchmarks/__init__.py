# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops bench``, and ``traceops programs`` (``programs_command``)."""

from __future__ import annotations

import os

__all__ = ['main']


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; see ``traceops bench --help``."""
    # cases run in processes of their own, beside this one: none may take the GPU's memory whole
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    from traceops.benchmarks.command import main as command
    return command(argv)
