# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernels in a program for NVIDIA GPUs. Imported when such a program is lowered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from traceops.ops import traps

__all__ = ['runner']


def runner(operation: Any, params: dict[str, Any], where: Any) -> Callable[..., Any]:
    """The kernel as a function of the operands, each device on its own part of them."""
    def one_device(*operands: Any) -> tuple[Any, ...]:
        if any(0 in a.shape for a in operands):
            return tuple(operation.reference(*operands, **params))
        call = operation.kernel(*operands, capability=where.capability, **params)
        if isinstance(call, str):       # a device's part has none, the whole has
            raise NotImplementedError(call)
        given = operands if call.prepare is None else call.prepare(operands)
        structs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in call.outputs]
        # the kernel's name in a profile, and what it does for who reads the program
        scope = operation.primitive.name + (
            f'/{call.unit}_operations_{call.operations}' if call.operations else '')
        with jax.named_scope(scope):
            outputs = traps.triton_call(given, structs, call, where.capability)
        return tuple(outputs) if call.finish is None else call.finish(operands, outputs)

    if where.devices == 1:
        return one_device

    def many_devices(*operands: Any) -> Any:
        addend = operands[operation.addend:] if operation.addend is not None else ()
        operands = operands[:len(operands) - len(addend)]
        axes = operation.axes(*operands, **params)
        partitioned = custom_partitioning(one_device)
        partitioned.def_partition(
            partition=_partition(axes, one_device), sharding_rule=_rule(axes),
            need_replication_factors=_factors(axes, axes.replicated))
        first, *others = partitioned(*operands)
        return (first + addend[0] if addend else first, *others)
    return many_devices


def _factors(axes: Any, names: Any) -> tuple[str, ...]:
    """Those names that are used, in the order of their first use: Shardy wants it."""
    used = dict.fromkeys(n for operand in (*axes.operands, *axes.results) for n in operand)
    return tuple(n for n in used if n in names)


def _rule(axes: Any) -> str:
    sides = [', '.join(' '.join(names) for names in side)
             for side in (axes.operands, axes.results)]
    return ' -> '.join(sides)


def _partition(axes: Any, one_device: Callable[..., Any]) -> Callable[..., Any]:
    """Every device runs the kernel on its part; sums over a sharded axis are reduced."""
    def partition(mesh: Any, operands: Sequence[Any], results: Sequence[Any]) -> Any:
        spread: dict[str, Any] = {}
        for names, a in zip(axes.operands, operands, strict=True):
            spec = (*a.sharding.spec, *(None,) * len(names))
            for name, mesh_axes in zip(names, spec, strict=False):
                if mesh_axes is not None and name not in axes.replicated:
                    spread.setdefault(name, mesh_axes)
        _disjoint(spread)

        def sharding(names: Sequence[str]) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(spread.get(n) for n in names)))

        def lower(*parts: Any) -> Any:
            outputs = list(one_device(*parts))
            for position, names in enumerate(axes.results):
                for axis in axes.summed:
                    if axis not in names and axis in spread:
                        outputs[position] = jax.lax.psum(outputs[position], spread[axis])
            return tuple(outputs)

        return (mesh, lower, tuple(map(sharding, axes.results)),
                tuple(map(sharding, axes.operands)))
    return partition


def _disjoint(spread: dict[str, Any]) -> None:
    """A mesh axis serves one named axis: of two that ask for it, the first."""
    taken: set[str] = set()
    for name, mesh_axes in list(spread.items()):
        each = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
        if taken & set(each):
            del spread[name]
        else:
            taken |= set(each)
