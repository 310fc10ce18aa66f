# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Hand-written loops: which gradients can wait until after the loop, and the loop without them."""
