# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``es_trace_window``: both factors of ES-D-RTRL over a window."""
