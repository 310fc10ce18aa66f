# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What ``traceops tune`` measured on this device: kernels against what XLA makes of the reference.

One JSON file for each device and version in the user's cache directory. The automatic choice reads
it; without one, the launch tables decide. Nothing is measured while a program is made or run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

__all__ = ['Measured', 'file_of', 'forget', 'found', 'known', 'problem', 'write']

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Measured:
    """Microseconds of one call by the kernel and by the reference; whether the kernel is right."""

    kernel: float
    reference: float
    right: bool
    detail: str = ''

    @property
    def backend(self) -> str:
        """The backend to use."""
        return 'triton' if self.right and self.kernel <= self.reference else 'jax'

    def __str__(self) -> str:
        if not self.right:
            return f'tried here: {self.detail}'
        return f'measured here: {self.kernel:.0f} us against {self.reference:.0f} us'


def file_of(kind: str) -> pathlib.Path:
    """Where the measurements of a kind of device are, for this version of traceops and jax."""
    import platformdirs

    import traceops
    device = re.sub(r'[^a-z0-9]+', '-', kind.lower()).strip('-')
    return platformdirs.user_cache_path('traceops') / (
        f'measured-{device}-{traceops.__version__}-jax-{jax.__version__}.json')


def write(kind: str, verdicts: Mapping[str, Measured]) -> pathlib.Path:
    """Add measurements to those of a device.

    Parameters
    ----------
    kind : str
        What the device calls itself.
    verdicts : mapping of str to Measured
        By what was measured (see ``Operation.measured_as``).

    Returns
    -------
    pathlib.Path
        The file.
    """
    path = file_of(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({'format': _FORMAT, 'device': kind, 'verdicts': {
        key: dataclasses.asdict(v) for key, v in {**known(kind), **verdicts}.items()}}, indent=1)
    part = path.with_suffix(f'.{os.getpid()}')
    part.write_text(text + '\n', encoding='utf-8')
    part.replace(path)              # whole or not at all, whoever reads meanwhile
    forget()
    return path


def known(kind: str) -> Mapping[str, Measured]:
    """All measurements of a kind of device; none where there is no file that can be read."""
    return _read(kind)[0]


def problem(kind: str) -> str:
    """Why the file of a device is ignored; empty where it is not, or where there is none."""
    return _read(kind)[1]


def found(kind: str, keys: Iterable[str]) -> Measured | None:
    """The measurement under the first of ``keys`` that has one."""
    verdicts = known(kind)
    return next((verdicts[key] for key in keys if key in verdicts), None)


def forget() -> None:
    """Read files again."""
    _read.cache_clear()


@functools.cache
def _read(kind: str) -> tuple[Mapping[str, Measured], str]:
    """Never raises: what is damaged, or somebody else's, is nothing."""
    try:
        path = file_of(kind)
        if not path.exists():
            return {}, ''
    except Exception as err:
        return {}, f'the cache directory cannot be read ({type(err).__name__}: {err})'
    try:
        given = json.loads(path.read_text(encoding='utf-8'))
        if given['format'] != _FORMAT or given['device'] != kind:
            return {}, f'{path} is of another device or form, and ignored'
        return {str(key): _checked(**fields) for key, fields in given['verdicts'].items()}, ''
    except Exception as err:
        return {}, f'{path} is damaged, and ignored ({type(err).__name__}: {err})'


def _checked(kernel: Any, reference: Any, right: Any, detail: Any) -> Measured:
    times = float(kernel), float(reference)
    if not all(math.isfinite(t) and t > 0. for t in times) and right is not False:
        raise ValueError(f'{kernel} us and {reference} us are no times')
    if not isinstance(right, bool) or not isinstance(detail, str):
        raise TypeError(f'{right!r} and {detail!r} are no verdict')
    return Measured(*times, right, detail)
