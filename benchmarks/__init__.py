# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops bench``, and ``traceops programs`` (``programs_command``)."""

from __future__ import annotations

__all__ = ['main']


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; see ``traceops bench --help``."""
    from traceops.benchmarks.command import main as command
    return command(argv)
