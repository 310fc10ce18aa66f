# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The rule of a learner's engine."""

from __future__ import annotations

from typing import Any

from traceops.host import upstream
from traceops.host.factorised import FactorisedRule
from traceops.host.param_dim import ParamDimRule

__all__ = ['make_rule']


def make_rule(learner: Any, lanes: bool,
              at_once: bool = False) -> ParamDimRule | FactorisedRule:
    """The rule of a learner's engine.

    Parameters
    ----------
    learner : braintrace learner
    lanes : bool
        It runs under ``vmap``.
    at_once : bool
        The steps of a window are folded together, not one by one.
    """
    factorised = isinstance(learner, upstream.IODimVjpAlgorithm)
    return (FactorisedRule if factorised else ParamDimRule)(learner, lanes, at_once)
