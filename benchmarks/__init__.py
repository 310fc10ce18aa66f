# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops bench`` and ``traceops programs``."""

from __future__ import annotations

__all__ = ['main', 'programs']


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; see ``traceops bench --help``."""
    from traceops.benchmarks.command import main as command
    return command(argv)


def programs(argv: list[str] | None = None) -> int:
    """Compile training for a GPU and print what it costs; see ``traceops programs --help``."""
    from traceops.benchmarks.programs_command import main as command
    return command(argv)
