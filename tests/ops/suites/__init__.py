# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""One suite an operation; every backend inherits it and must pass the same."""

from tests.ops.suites.base import Suite, close, draw, parts, rows, spikes
from tests.ops.suites.products import (
    DTraceWindowSuite,
    SparseTraceGradientSuite,
    TraceGradientBySampleSuite,
    TraceGradientSuite,
)
from tests.ops.suites.simulations import SimulateWindowSuite
from tests.ops.suites.windows import AdjointWindowSuite, EsTraceWindowSuite, LeavingWindowSuite

__all__ = ['AdjointWindowSuite', 'DTraceWindowSuite', 'EsTraceWindowSuite', 'LeavingWindowSuite',
           'SimulateWindowSuite', 'SparseTraceGradientSuite', 'Suite',
           'TraceGradientBySampleSuite', 'TraceGradientSuite',
           'close', 'draw', 'parts', 'rows', 'spikes']
