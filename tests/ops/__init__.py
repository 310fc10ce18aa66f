# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
