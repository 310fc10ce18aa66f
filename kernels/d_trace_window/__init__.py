# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``d_trace_window``: one pass over the D-RTRL trace for a whole window."""
