# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``adjoint_window``: the reverse scan that replaces the D-RTRL trace."""
