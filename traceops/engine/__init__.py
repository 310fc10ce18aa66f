# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The window engine: record a window, one adjoint scan, one weight VJP per relation."""
