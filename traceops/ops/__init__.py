# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The trace operations: JAX primitives with a reference everywhere and Triton kernels on GPUs.

>>> from traceops import ops
>>> ops.adjoint_window(signal, jacobian, [factor])        # doctest: +SKIP
"""

from traceops.ops.adjoint_window import adjoint_window, leaving_window
from traceops.ops.choice import BackendError, BackendWarning, Decision
from traceops.ops.d_trace_window import d_trace_start, d_trace_update, d_trace_window
from traceops.ops.es_trace_window import es_trace_update, es_trace_window
from traceops.ops.report import OperationReport, Report, report, why
from traceops.ops.simulate_window import Simulation, simulate_window
from traceops.ops.sparse_trace_gradient import sparse_trace_gradient
from traceops.ops.trace_gradient import PRECISIONS, trace_gradient

__all__ = [
    'PRECISIONS', 'BackendError', 'BackendWarning', 'Decision', 'OperationReport', 'Report',
    'Simulation', 'adjoint_window', 'd_trace_start', 'd_trace_update', 'd_trace_window',
    'es_trace_update', 'es_trace_window', 'leaving_window', 'report', 'simulate_window',
    'sparse_trace_gradient',
    'trace_gradient', 'why',
]
