# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""traceops: online learning with eligibility traces at about the cost of simulating.

>>> import traceops
>>> traceops.install()          # braintrace learners made from now on are fast
"""

from traceops.config import Settings, configure, configured, reset, settings
from traceops.host.explain import Explanation, explain
from traceops.host.learners import D_RTRL, ES_D_RTRL
from traceops.host.patch import compile, enabled, install, installed, uninstall
from traceops.status import Status, status

__version__ = '0.1.0'

__all__ = [
    'D_RTRL', 'ES_D_RTRL', 'Explanation', 'Settings', 'Status', 'compile', 'configure',
    'configured', 'enabled', 'explain', 'install', 'installed', 'reset', 'settings', 'status',
    'uninstall',
]
