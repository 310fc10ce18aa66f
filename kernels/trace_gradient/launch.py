# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``trace_gradient`` has no launch of its own."""

from __future__ import annotations

from typing import Any

__all__ = ['plan']


def plan(*operands: Any, capability: int, precision: str) -> str:
    """Why there is no kernel."""
    return 'a matrix product: XLA has the faster kernels'
