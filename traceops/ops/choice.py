# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an operation: as asked, else by platform; and why.

A named backend works or raises. The automatic choice never fails: what it cannot use, it
replaces by the reference, and can say why.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning

from traceops import config
from traceops.errors import TraceopsError
from traceops.kernels.launch import KernelCall
from traceops.ops import measured, verify

__all__ = ['BACKENDS', 'BackendError', 'BackendWarning', 'Decision', 'Place', 'by_platform',
           'cuda_place', 'current_place', 'decide', 'devices_needed', 'failed', 'place',
           'requested', 'runner']

BACKENDS = ('auto', 'jax', 'triton')


class BackendError(TraceopsError, RuntimeError):
    """A backend was named that cannot run here."""


class BackendWarning(UserWarning):
    """The automatic choice had to give up a kernel."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """A backend, and why it was chosen."""

    backend: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a program will run.

    Attributes
    ----------
    platform : str
        ``'cuda'``; ``'interpret'``: a CPU where Triton's interpreter is switched on; else what
        jax calls it.
    capability : int
        Compute capability, e.g. 90; 0 where there is none.
    kind : str
        Name of the device.
    devices : int
        How many share one call: more than one where XLA partitions the program.
    present : bool
        Whether a device of this kind is in this machine (else the program is only compiled).
    """

    platform: str
    capability: int = 0
    kind: str = ''
    devices: int = 1
    present: bool = True


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f'backend={backend!r} is not known; there are '
                         f"{', '.join(map(repr, BACKENDS))}, e.g. backend='auto'.")
    return backend


def requested(backend: str | None = None) -> str:
    """The backend asked for: by the call, else by the settings."""
    return config.settings().backend if backend is None else _known(backend)


def place(ctx: Any, platform: str | None) -> Place:
    """Where the program that is being lowered will run."""
    devices, sharing = _devices(ctx.module_context.axis_context)
    if platform == 'cuda':
        return _cuda_place(devices, sharing)
    return dataclasses.replace(
        current_place(platform or ctx.module_context.platforms[0]), devices=sharing)


def current_place(platform: str | None = None) -> Place:
    """Where a program for a platform other than CUDA runs (default: jax's own choice)."""
    if os.environ.get('TRITON_INTERPRET') == '1':
        return Place('interpret', 90, 'interpreter')
    return Place(platform or jax.default_backend())


def cuda_place() -> Place:
    """The GPU of this machine."""
    return _cuda_place((), 1)


def _devices(context: Any) -> tuple[Sequence[Any], int]:
    """The devices of the program that is being lowered, and how many share one call.

    Inside ``shard_map`` every device has a call of its own.
    """
    mesh = getattr(context, 'mesh', None)
    if mesh is not None:
        shared = [n for axis, n in mesh.shape.items() if axis not in context.manual_axes]
        return tuple(getattr(mesh, 'devices', np.empty(0)).flat), math.prod(shared)
    devices = tuple(getattr(context, 'device_assignment', None) or ())
    # which they are may not be known where their number is
    return devices, max(len(devices), getattr(context, 'num_devices', 1))


def _cuda_place(devices: Sequence[Any], sharing: int) -> Place:
    """Of the program's devices, else of those in this machine."""
    try:
        here = jax.devices('cuda')
    except RuntimeError:
        here = []
    first = (devices or here or [None])[0]
    asked = os.environ.get('TRACEOPS_COMPUTE_CAPABILITY', '')
    found = str(getattr(first, 'compute_capability', '') or asked).replace('.', '')
    return Place('cuda', int(found) if found.isdigit() else 0,
                 str(getattr(first, 'device_kind', 'unknown')), sharing,
                 any(d.device_kind == getattr(first, 'device_kind', None) for d in here))


@functools.cache
def devices_needed() -> Any:
    """Where programs for CUDA can be made: a jaxpr that makes jax tell a lowering its devices.

    The partitioned program of a kernel needs to know them; jax offers no other public way.
    """
    if not any(importlib.util.find_spec(f'jax_cuda{v}_plugin') for v in (12, 13)):
        return None
    marker = custom_partitioning(lambda x: x)
    marker.def_partition(partition=None, sharding_rule='i -> i')
    return jax.make_jaxpr(marker)(jax.ShapeDtypeStruct((1,), 'float32'))


def by_platform(*operands: Any, cuda: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """``jax.lax.platform_dependent``, where programs for CUDA can be made; else no second trace."""
    if devices_needed() is None:
        return default(*operands)
    return jax.lax.platform_dependent(*operands, cuda=cuda, default=default)


def decide(operation: Any, operands: Sequence[Any], params: dict[str, Any], request: str,
           where: Place) -> Decision:
    """The backend of one call.

    Raises
    ------
    BackendError
        ``request`` names a backend that cannot serve the call.
    """
    if request == 'jax':
        return Decision('jax', 'asked for')
    if any(0 in a.shape for a in operands):
        return Decision('jax', 'nothing to launch: an operand is empty')
    call = _call(operation, operands, params, where)
    problem = call if isinstance(call, str) else None
    if request == 'triton':
        if problem is not None:
            raise BackendError(
                f"{operation.name}: backend='triton' was asked for, but {problem}. Available "
                f"here: 'jax'. Call {operation.name}(..., backend='jax'), or leave the choice "
                "open with backend='auto'.")
        return Decision('triton', 'asked for')
    if isinstance(call, str):
        return Decision('jax', call)
    times = _measured(operation, operands, params, where)
    if times is not None and times.backend == 'jax':
        return Decision('jax', str(times))
    if call.rather and times is None:
        return Decision('jax', call.rather)
    if where.devices > 1 and operation.shared:
        return Decision('jax', operation.shared)
    verdict = verify.verdict(operation, where, operands, params)
    if verdict.passed is False:
        _warn(operation, where, verdict.detail)
        return Decision('jax', f'the kernel did not pass its check: {verdict.detail}')
    return Decision('triton', f'kernel, {verdict.detail if times is None else times}')


def _measured(operation: Any, operands: Sequence[Any], params: dict[str, Any],
              where: Place) -> measured.Measured | None:
    """What ``traceops tune`` found of such a call on this device."""
    if operation.measured_as is None or not where.present:
        return None
    return measured.found(where.kind, operation.measured_as(*operands, **params))


def _call(operation: Any, operands: Sequence[Any], params: dict[str, Any],
          where: Place) -> KernelCall | str:
    """The kernel's launch, or why it cannot serve this call."""
    if where.platform not in ('cuda', 'interpret'):
        return f'kernels run on NVIDIA GPUs and this program is for {where.platform}'
    call = operation.kernel(*operands, capability=where.capability, **params)
    if where.platform != 'cuda' or isinstance(call, str):
        return call
    from traceops.ops import traps
    return traps.problem(where.capability) or call


def runner(operation: Any, params: dict[str, Any], where: Place) -> Callable[..., Any]:
    """The kernel as a function of the operands."""
    if where.platform == 'cuda':
        from traceops.ops import gpu
        return gpu.runner(operation, params, where)
    from traceops.ops import interpreter
    return interpreter.runner(operation, params, where)


def failed(operation: Any, request: str, where: Place, err: Exception,
           params: dict[str, Any]) -> None:
    """A kernel did not compile: raise for a named backend, else remember and warn."""
    detail = f'{type(err).__name__}: {str(err).strip().splitlines()[0] if str(err) else ""}'
    if request == 'triton':
        raise BackendError(f"{operation.name}: backend='triton' was asked for, and the kernel "
                           f"does not compile for {where.kind}: {detail}. Call "
                           f"{operation.name}(..., backend='jax').") from err
    verify.remember(operation, where, verify.Verdict(False, f'it does not compile: {detail}'),
                    params)
    _warn(operation, where, detail)


_warned: set[tuple[str, str]] = set()


def _warn(operation: Any, where: Place, detail: str) -> None:
    """Once for each kernel and device."""
    if (operation.name, where.kind) in _warned:
        return
    _warned.add((operation.name, where.kind))
    warnings.warn(
        f'traceops does not use its kernel {operation.name} on {where.kind}: {detail}. The '
        f'reference runs instead, with the same result. Please report this line with what '
        f'`traceops doctor` prints.', BackendWarning, stacklevel=2)
