# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``simulate_window``: all steps of a simulation in one kernel, made from the step's program."""
