# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``python -m traceops``."""

import sys

from traceops.cli import main

sys.exit(main())
