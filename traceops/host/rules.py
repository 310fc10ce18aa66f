# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The rule of a learner's engine."""

from __future__ import annotations

from typing import Any

from traceops.host import upstream
from traceops.host.factorised import FactorisedRule
from traceops.host.param_dim import ParamDimRule

__all__ = ['make_rule']


def make_rule(learner: Any, lanes: bool) -> ParamDimRule | FactorisedRule:
    """The rule of a learner's engine. ``lanes``: the learner runs under ``vmap``."""
    if isinstance(learner, upstream.IODimVjpAlgorithm):
        return FactorisedRule(learner, lanes)
    return ParamDimRule(learner, lanes)
