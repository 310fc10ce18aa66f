# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``sparse_trace_gradient``: the gradient of a window for the synapses of a sparse weight."""
