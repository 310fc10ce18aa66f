# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops demo``: a spiking network learns handwritten digits online."""

from __future__ import annotations

__all__ = ['main']


def main(argv: list[str] | None = None) -> int:
    """Run the demo; see ``traceops demo --help``."""
    try:
        import sklearn.datasets  # noqa: F401

        from traceops.demo.command import main as command
    except ModuleNotFoundError as err:
        missing = (err.name or '').split('.')[0]
        if missing not in ('matplotlib', 'sklearn'):
            raise
        print(f"the demo needs {missing}: pip install 'braintrace-traceops[demo]'")
        return 1
    return command(argv)
