# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A compiler of steps: one traced step as a program, cut into what the loop over time computes and
what is recomputed after it. It knows neither braintrace nor the operations of the project.
"""
