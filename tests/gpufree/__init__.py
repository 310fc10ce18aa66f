# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0

#: One device of each generation that the launch tables know, by its name in ``targets.GPUS``.
TARGETS = ('a100', 'h100', 'b200')
