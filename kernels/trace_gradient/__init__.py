# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``trace_gradient``: the weight gradient of a window as one matrix product."""
