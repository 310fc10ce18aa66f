# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``trace_gradient``: the weight gradient of a window as one matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from traceops.kernels.trace_gradient import launch
from traceops.kernels.trace_gradient.cpu import trace_gradient as _on_cpu
from traceops.kernels.trace_gradient.reference import PRECISIONS
from traceops.kernels.trace_gradient.reference import trace_gradient as _definition
from traceops.ops.checks import positions, promoted, ranked, same_dtype
from traceops.ops.primitive import Axes, Operation, at_axis, bind, define

__all__ = ['PRECISIONS', 'TRACE_GRADIENT', 'trace_gradient']

_NAMES = ('inputs', 'delta', 'total')


def _arguments(count: int, **_: Any) -> Sequence[str]:
    return _NAMES[:count]


def _axes(inputs: Any, delta: Any, *total: Any, by_sample: bool, **_: Any) -> Axes:
    name = 'trace_gradient'
    lanes = positions(name, 'inputs', inputs, '[T, B, I]', 3)
    ranked(name, 'delta', delta, '[T, B, O]', len(lanes) + 3)
    result = (*lanes, *('b',) * by_sample, 'i', 'o')
    for a in total:
        ranked(name, 'total', a, '[B, I, O]' if by_sample else '[I, O]', len(result))
    operands = ((*lanes, 't', 'b', 'i'), (*lanes, 't', 'b', 'o'), *(result for _ in total))
    return Axes(operands=operands,
                results=(result,), replicated=frozenset(), summed=('t', 'b'))


def _dtypes(*operands: Any, **_: Any) -> list[Any]:
    return [same_dtype('trace_gradient', _NAMES[:len(operands)], operands)]


def _reference(*operands: Any, precision: str, by_sample: bool, **_: Any) -> Any:
    return (_definition(*operands, precision=precision, by_sample=by_sample),)


def _cpu(*operands: Any, events: bool = False, **params: Any) -> Any:
    return (_on_cpu(*operands, events=events, **params),)


def _batch(operation: Operation, size: int, operands: Sequence[Any], dims: Sequence[Any],
           request: str, params: dict[str, Any]) -> Any:
    """Lanes are batch axes of the product.

    XLA for CPUs folds a sum over lanes that follows into the product; XLA for GPUs does not, and
    makes an array of lanes x I x O: who sums over lanes there puts them in the batch.
    """
    moved = [at_axis(a, d, 0, size) for a, d in zip(operands, dims, strict=True)]
    return bind(operation, *moved, backend=request, **params), [0]


def _cases() -> list[Any]:
    """Spikes, but for ``'highest'``; and for ``'tf32'`` deltas that its rounding leaves alone."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: np.float32(rng.standard_normal(shape))  # noqa: E731
    spikes = (rng.random((7, 3, 33)) < 0.2).astype(np.float32)
    delta, total = draw(7, 3, 36), draw(33, 36)
    few_bits = np.float32(np.round(delta * 32) / 32)
    return [((x, d, total), {'precision': precision, 'by_sample': False}) for precision, x, d in (
        ('highest', draw(7, 3, 33), delta), ('bf16x3', spikes, delta),
        ('bf16x2', spikes, delta), ('tf32', spikes, few_bits))]


TRACE_GRADIENT = define(Operation(
    name='trace_gradient', arguments=_arguments, reference=_reference, cpu=_cpu, axes=_axes,
    dtypes=_dtypes, kernel=launch.plan, batch=_batch, cases=_cases, addend=2))


def trace_gradient(inputs: Any, delta: Any, total: Any = None, *, precision: str = 'highest',
                   by_sample: bool = False, events: bool = False,
                   backend: str | None = None) -> Any:
    r"""Weight gradient of a window: :math:`dW = dW_0 + \sum_t \sum_b x \otimes \delta`.

    Parameters
    ----------
    inputs : array, ``[T, B, I]``
        :math:`x`.
    delta : array, ``[T, B, O]``
        :math:`\delta`.
    total : array, ``[I, O]``, optional
        :math:`dW_0`, a gradient to add to.
    precision : {'highest', 'bf16x3', 'bf16x2', 'tf32'}
        ``'highest'``: float32 throughout (relative error by norm 1e-7 to 2e-7), for any input;
        the kernel makes it of three products in tf32, whose terms together hold 22 bits, and
        an infinity among the operands gives NaN.
        ``'bf16x3'``, ``'bf16x2'``: ``inputs`` in bfloat16, which is exact for spikes (and any
        value of 8 significant bits), ``delta`` as the sum of three or two bfloat16 terms, so
        that tensor cores do the work: errors about 1e-7 and 3e-6; other inputs are rounded
        (2e-3). ``'tf32'``: both operands rounded to 10 bits: 3e-4. Measured by
        ``tests/ops/test_trace_gradient.py``. In float64 all are ``'highest'``.
    by_sample : bool
        Sum over steps alone. The result is ``[B, I, O]``, and so is ``total``.
    events : bool
        The inputs may be spikes. On a CPU a large product (``'highest'``, of the whole batch,
        without ``total``) is then a program that counts those that are not zero, and of few adds
        only their rows: the same sum to rounding. It takes longer to compile.
    backend : {'auto', 'jax', 'triton'}, optional
        Default: ``traceops.settings().backend``.

    Returns
    -------
    array, ``[I, O]``
        In the dtype that operands of several are promoted to, as in ``inputs * delta``.

    Raises
    ------
    ValueError, TypeError
        A shape, dtype or precision that does not fit; the message names the argument.
    BackendError
        ``backend`` is named and cannot run here.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'trace_gradient: `precision` is {precision!r}; it takes '
                         f"{', '.join(map(repr, PRECISIONS))}, e.g. precision='highest'.")
    given = promoted('trace_gradient', _NAMES, [
        jnp.asarray(a) for a in (inputs, delta, total) if a is not None])
    return bind(TRACE_GRADIENT, *given, backend=backend, precision=precision,
                by_sample=bool(by_sample), events=bool(events))[0]
