# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""traceops: online learning with eligibility traces at about the cost of simulating.

>>> import traceops
>>> traceops.install()          # braintrace learners made from now on are fast
"""

import importlib
from typing import TYPE_CHECKING, Any

from traceops.config import Settings, configure, configured, install_asked, reset, settings
from traceops.errors import UnsupportedVersionError
from traceops.status import Status, status

if TYPE_CHECKING:
    from traceops.host.explain import Explanation, LoopsExplanation, explain
    from traceops.host.learners import D_RTRL, ES_D_RTRL
    from traceops.host.patch import (
        accelerate,
        compile,
        enabled,
        install,
        installed,
        uninstall,
    )

__version__ = '0.2.0'

__all__ = [
    'D_RTRL', 'ES_D_RTRL', 'Explanation', 'LoopsExplanation', 'Settings', 'Status', 'accelerate',
    'compile', 'configure', 'configured', 'enabled', 'explain', 'install', 'installed', 'reset',
    'settings', 'status', 'uninstall',
]

#: What needs braintrace is imported when it is asked for: an unsupported version is an error of
#: the call, not of the import.
_HOST = {
    **dict.fromkeys(('Explanation', 'LoopsExplanation', 'explain'), 'explain'),
    **dict.fromkeys(('D_RTRL', 'ES_D_RTRL'), 'learners'),
    **dict.fromkeys(('accelerate', 'compile', 'enabled', 'install', 'installed', 'uninstall'),
                    'patch'),
}


def __getattr__(name: str) -> Any:
    if name not in _HOST:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        module = importlib.import_module(f'traceops.host.{_HOST[name]}')
    except UnsupportedVersionError:     # a private name has moved: say it by version if we can
        from traceops.host import versions
        versions.check()
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


if install_asked():
    __getattr__('install')()
