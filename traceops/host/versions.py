# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Which versions of the host libraries are supported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from traceops.errors import UnsupportedVersionError

__all__ = ['SUPPORTED', 'check', 'installed_versions']

SUPPORTED: dict[str, SpecifierSet] = {
    'braintrace': SpecifierSet('>=0.2.6,<0.2.9'),
    'jax': SpecifierSet('>=0.10,<0.13'),
}


def installed_versions() -> dict[str, str | None]:
    """The installed version of each package in :data:`SUPPORTED` (None: not installed)."""
    found: dict[str, str | None] = {}
    for name in SUPPORTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def check(versions: Mapping[str, str | None] | None = None) -> None:
    """Raise unless braintrace and jax are in the supported range.

    Parameters
    ----------
    versions : mapping, optional
        Package name to version; the installed ones by default.

    Raises
    ------
    UnsupportedVersionError
        Naming each package, its version and the range.
    """
    versions = installed_versions() if versions is None else versions
    wrong = [f'{name} {versions.get(name) or "(not installed)"}, only {spec}'
             for name, spec in SUPPORTED.items() if not _within(versions.get(name), spec)]
    if wrong:
        pins = ' '.join(f"'{name}{spec}'" for name, spec in SUPPORTED.items())
        raise UnsupportedVersionError(
            f'traceops does not support {"; ".join(wrong)}. Install what it supports with: '
            f'pip install {pins}')


def _within(version: str | None, spec: SpecifierSet) -> bool:
    try:
        return version is not None and spec.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False
