# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables as plain text."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

__all__ = ['render']


def render(table: Any, width: int = 160) -> str:
    """A rich renderable as text of at most ``width`` columns."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(table)
    return '\n'.join(line.rstrip() for line in out.getvalue().splitlines()) + '\n'
