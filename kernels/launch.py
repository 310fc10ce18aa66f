# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a launch table answers: one kernel call, described without importing Triton."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ['GENERATIONS', 'KernelCall', 'Tile', 'ceil_div', 'generation', 'kernel_function',
           'power_of_2', 'steps_ahead']

#: Device generations that the tables know, by compute capability.
GENERATIONS = {80: 'sm_80', 90: 'sm_90', 100: 'sm_100'}


@dataclasses.dataclass(frozen=True)
class Tile:
    """One entry of a launch table.

    Attributes
    ----------
    block : tuple of int
        Tile of one program; its meaning is the table's.
    warps, stages : int
        Of the launch.
    blocks_per_sm : int
        How many programs are meant to share a multiprocessor: registers and shared memory must
        allow it (checked from the compiled kernel).
    """

    block: tuple[int, ...]
    warps: int = 4
    stages: int = 2
    blocks_per_sm: int = 4


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A launch: which kernel, on what grid, with which constants.

    Attributes
    ----------
    kernel : str
        ``'folder.function'``: ``function`` of ``traceops/kernels/folder/triton.py``.
    outputs : tuple of (shape, dtype)
        In the order of the kernel's output pointers.
    grid : tuple of int
        Programs.
    scalars : tuple of int
        Passed after the operands, at run time.
    constants : mapping of str to int, float or bool
        The kernel's ``constexpr`` parameters.
    tile : Tile
        The entry of the launch table.
    aliases : mapping of int to int
        Operand that is overwritten by an output: the kernel has one pointer for both.
    prepare : callable, optional
        ``(operands) -> the kernel's operands``, in JAX: where they differ.
    finish : callable, optional
        ``(operands, outputs) -> results``, in JAX: where the outputs are not the results yet.
    operations : int
        Multiplications and additions, where they can be what takes the time (products).
    unit : str
        What they are done in: ``'bf16'`` or ``'tf32'`` (tensor cores), ``'fp32'``.
    rather : str
        Why the automatic choice leaves this call to XLA; empty where it does not. Who names the
        kernel gets it.
    """

    kernel: str
    outputs: tuple[tuple[tuple[int, ...], Any], ...]
    grid: tuple[int, ...]
    scalars: tuple[int, ...]
    constants: Mapping[str, Any]
    tile: Tile
    aliases: Mapping[int, int] = dataclasses.field(default_factory=dict)
    prepare: Callable[..., Sequence[Any]] | None = None
    finish: Callable[..., tuple[Any, ...]] | None = None
    operations: int = 0
    unit: str = ''
    rather: str = ''


def kernel_function(name: str) -> Any:
    """The ``@triton.jit`` function of a name like ``'folder.function'``; imports Triton."""
    folder, function = name.split('.')
    return getattr(importlib.import_module(f'traceops.kernels.{folder}.triton'), function)


def generation(capability: int) -> int:
    """The newest generation of the tables that a device of this compute capability can use."""
    known = [g for g in GENERATIONS if g <= capability]
    return max(known) if known else min(GENERATIONS)


def ceil_div(a: int, b: int) -> int:
    """Programs of ``b`` elements that cover ``a``."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def steps_ahead(values: int, of_a_step: int, steps: int) -> int:
    """How many of ``steps`` a thread loads ahead, holding at most ``values``: a power of two to 8.

    A thread that waits for every step takes three times as long over a window.
    """
    return max(s for s in (1, 2, 4, 8) if s == 1 or s * of_a_step <= values and s <= steps)
