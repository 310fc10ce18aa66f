# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernels on a CPU, through Triton's interpreter: slow, exact in what it runs.

``TRITON_INTERPRET=1`` must be set before triton is first imported. Then a kernel is reached
through the same primitive as on a GPU, as a host callback.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.kernels.launch import KernelCall, kernel_function

__all__ = ['Buffer', 'launch', 'runner']

#: The interpreter keeps the program index in globals.
_lock = threading.Lock()

#: Elements around every buffer that a kernel must leave alone.
MARGIN = 1024

#: What the margins of an output hold; large, exact in every dtype.
_AROUND = 49152.


class Buffer:
    """All that the interpreter asks of a tensor, over a NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype = array, array.dtype

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def element_size(self) -> int:
        return self.array.itemsize

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    shape = property(size)

    def storage_offset(self) -> int:
        return 0

    def untyped_storage(self) -> Buffer:
        return self

    cpu = untyped_storage

    def new_empty(self, *_: Any, **__: Any) -> Buffer:
        return self

    set_ = new_empty

    def copy_(self, _: Any) -> Buffer:
        return self


def _guarded(shape: tuple[int, ...], dtype: Any, around: float) -> tuple[np.ndarray, np.ndarray]:
    """An array of NaN between two margins, and the larger array that holds all three."""
    size = int(np.prod(shape))
    whole = np.full(size + 2 * MARGIN, around, dtype)
    inner = whole[MARGIN:MARGIN + size].reshape(shape)
    inner[...] = np.nan if jnp.issubdtype(dtype, jnp.inexact) else np.iinfo(dtype).min
    return inner, whole


def launch(call: KernelCall, operands: list[np.ndarray]) -> list[np.ndarray]:
    """Run a kernel; raise where it writes outside of its outputs.

    Outputs are NaN before, and so is what lies around an operand that is only read: a result
    that was not written, or that depends on what lies outside, is NaN.
    """
    if os.environ.get('TRITON_INTERPRET') != '1':
        raise RuntimeError('the interpreter needs TRITON_INTERPRET=1 in the environment before '
                           'triton is first imported')
    arguments, written = [], {}
    for position, operand in enumerate(operands):
        changes = position in call.aliases
        inner, whole = _guarded(operand.shape, operand.dtype, _AROUND if changes else np.nan)
        inner[...] = operand
        arguments.append(inner)
        if changes:
            written[call.aliases[position]] = inner, whole
    fresh = []
    for position, (shape, dtype) in enumerate(call.outputs):
        if position not in written:
            written[position] = _guarded(shape, dtype, _AROUND)
            fresh.append(written[position][0])
    with _lock:
        kernel_function(call.kernel)[call.grid](*map(Buffer, arguments), *call.scalars,
                                         *map(Buffer, fresh), **call.constants)
    for inner, whole in written.values():
        around = np.concatenate([whole[:MARGIN], whole[MARGIN + inner.size:]])
        if not (around == np.asarray(_AROUND, whole.dtype)).all():
            raise RuntimeError(f'{call.kernel} wrote outside of its outputs')
    return [written[position][0] for position in range(len(call.outputs))]


def runner(operation: Any, params: dict[str, Any], where: Any) -> Callable[..., Any]:
    """The kernel as a function of jax arrays."""
    def run(*operands: Any) -> Any:
        call = operation.kernel(*operands, capability=where.capability, **params)
        given = operands if call.prepare is None else call.prepare(operands)
        structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in call.outputs]

        def host(*arrays: Any) -> Any:
            return [np.ascontiguousarray(a) for a in
                    launch(call, [np.asarray(a) for a in arrays])]

        outputs = jax.pure_callback(host, structs, *given)
        outputs = [jnp.asarray(a) for a in outputs]
        return tuple(outputs) if call.finish is None else call.finish(operands, outputs)
    return run
