# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What is installed here, and how it is set."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import sys
from importlib import metadata
from typing import Any

import jax
from rich.table import Table

from traceops import config
from traceops.host.versions import SUPPORTED
from traceops.text import render

__all__ = ['Status', 'status']

_PACKAGES = {'braintrace': 'braintrace', 'brainstate': 'brainstate', 'brainpy': 'brainpy',
             'braintools': 'braintools', 'saiunit': 'saiunit', 'jax': 'jax', 'jaxlib': 'jaxlib',
             'triton': 'triton', 'jax_triton': 'jax-triton'}


@dataclasses.dataclass(frozen=True)
class Status:
    """What :func:`status` found; ``str()`` is a table, :meth:`to_dict` is for machines."""

    versions: dict[str, str | None]
    devices: tuple[str, ...]
    device_error: str
    installed: bool
    settings: config.Settings
    environment: dict[str, str]
    kernels: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        return {**dataclasses.asdict(self), 'devices': list(self.devices)}

    def __str__(self) -> str:
        table = Table(title='traceops status', title_justify='left', show_header=False)
        for name, version in self.versions.items():
            supported = f'  (supported {SUPPORTED[name]})' if name in SUPPORTED else ''
            table.add_row(name, (version or 'not installed') + supported)
        table.add_row('devices', ', '.join(self.devices) or f'none: {self.device_error}')
        table.add_row('installed', 'yes' if self.installed else
                      'no (traceops.install() makes new learners fast)')
        for field in dataclasses.fields(self.settings):
            table.add_row(field.name, _setting(field.name, getattr(self.settings, field.name)))
        for name, text in self.kernels.items():
            table.add_row(name, text)
        for name, text in self.environment.items():
            table.add_row(name, f'{text}  (environment)')
        return render(table).rstrip()


#: Settings that may be left open, and what decides then.
_OPEN = {'window': 'chosen within memory_budget', 'two_phase': 'on a GPU',
         'memory_budget': '256 MiB, on a GPU 1 GiB'}


def _setting(name: str, value: Any) -> str:
    if name == 'memory_budget' and value is not None:
        return f'{value / 2 ** 20:g} MiB'
    return _OPEN[name] if value is None else str(value)


def _devices() -> tuple[tuple[str, ...], str]:
    """What jax sees, or what it says when it cannot start (``JAX_PLATFORMS``, a driver)."""
    try:
        return tuple(map(_device, jax.devices())), ''
    except RuntimeError as err:
        return (), str(err)


def _device(device: Any) -> str:
    kind = device.device_kind
    return str(device) if kind == device.platform else f'{device} ({kind})'


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _installed() -> bool:
    """Of a host library outside the supported range the patch cannot even be imported."""
    patch = sys.modules.get('traceops.host.patch')
    return patch is not None and patch.installed()


def _kernels() -> dict[str, str]:
    """Checks of kernels that were run in this process; none is run to learn of it."""
    verify = sys.modules.get('traceops.ops.verify')
    return {} if verify is None else {
        f'{operation} on {device}': f'{"passed" if found.passed else "FAILED"}: {found.detail}'
        for (operation, _, device), found in verify.verdicts().items()}


def status() -> Status:
    """Versions, devices, whether traceops is installed, and the settings in force.

    Returns
    -------
    Status
        ``print`` it, or read its fields. ``None`` in ``versions``: not installed. Where jax
        cannot start, ``devices`` is empty and ``device_error`` has its message. ``kernels``:
        what was found of the GPU kernels that this process has used or tried to use.

    Raises
    ------
    SettingsError
        An environment variable of traceops has an illegal value.
    """
    versions: dict[str, str | None] = {'python': platform.python_version()}
    # the code that runs, which need not be the distribution that is installed
    versions['traceops'] = importlib.import_module('traceops').__version__
    versions |= {name: _version(dist) for name, dist in _PACKAGES.items()}
    devices, device_error = _devices()
    names = [*config.ENVIRONMENT.values(), 'TRACEOPS_INSTALL']
    return Status(
        versions=versions, devices=devices, device_error=device_error, installed=_installed(),
        settings=config.settings(),
        environment={n: os.environ[n] for n in names if os.environ.get(n)},
        kernels=_kernels())
