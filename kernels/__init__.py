# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""One folder an operation; installed as ``traceops.kernels``."""
