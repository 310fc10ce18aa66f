# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The errors traceops raises, all children of :class:`TraceopsError`."""

from __future__ import annotations

__all__ = ['SettingsError', 'TraceNotCarriedError', 'TraceopsError', 'UnsupportedVersionError']


class TraceopsError(Exception):
    """Base of every error of this package."""


class UnsupportedVersionError(TraceopsError, RuntimeError):
    """braintrace or jax is outside the supported range."""


class SettingsError(TraceopsError, ValueError):
    """An unknown setting, or a value a setting cannot take."""


class TraceNotCarriedError(TraceopsError, RuntimeError):
    """The call needs an eligibility trace, and the learner was made with ``carry_trace=False``."""
