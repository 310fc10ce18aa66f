# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``d_trace_window`` and its one-step form ``d_trace_update``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from traceops.kernels.d_trace_window import launch
from traceops.kernels.d_trace_window.cpu import d_trace_window as _on_cpu
from traceops.kernels.d_trace_window.reference import d_trace_start as _start
from traceops.kernels.d_trace_window.reference import d_trace_window as _definition
from traceops.ops.checks import floating, ranked, same_dtype
from traceops.ops.primitive import Axes, Operation, at_axis, bind, define
from traceops.ops.states import join, join_rows
from traceops.ops.trace_gradient import trace_gradient

__all__ = ['D_TRACE_WINDOW', 'd_trace_start', 'd_trace_update', 'd_trace_window']

_NAMES = ('trace', 'inputs', 'factor', 'transition', 'signal')
_AXES = (('b', 'i', 'o', 's'), ('t', 'b', 'i'), ('t', 'b', 'o', 's'), ('b', 'o', 's', 's2'),
         ('b', 'o', 's'))


def _axes(*operands: Any, gradient: str, in_place: bool = True) -> Axes:
    for argument, names, a in zip(_NAMES, _AXES, operands, strict=True):
        shape = f'[{", ".join(n[0].upper() for n in names)}]'
        ranked('d_trace_window', argument, a, shape, len(names))
    transition = operands[3]
    if transition.shape[-1] != transition.shape[-2]:
        raise ValueError(f'd_trace_window: `transition` has shape {transition.shape}; its last '
                         'two axes, both of states, differ.')
    return Axes(operands=_AXES, results=(_AXES[0], ('i', 'o')),
                replicated=frozenset({'t', 's', 's2'}), summed=('b',))


def _dtypes(trace: Any, *others: Any, gradient: str, in_place: bool = True) -> list[Any]:
    floating('d_trace_window', ('trace',), (trace,))
    return [trace.dtype, same_dtype('d_trace_window', _NAMES[1:], others)]


def _reference(*operands: Any, gradient: str, in_place: bool = True) -> Any:
    return _definition(*operands, gradient)


def _cpu(*operands: Any, gradient: str, in_place: bool = True, alone: bool) -> Any:
    return _on_cpu(*operands, gradient=gradient)


def _batch(operation: Operation, size: int, operands: Sequence[Any], dims: Sequence[Any],
           request: str, params: dict[str, Any]) -> Any:
    """The mapped axis becomes part of the batch: one launch for all lanes.

    The gradient, which is summed over the batch but not over lanes, is formed outside: there
    XLA fuses it with a sum over lanes that follows, and no array of lanes x I x O appears.
    """
    gradient = params['gradient']
    if gradient != 'entering' or any(d is not None for d in dims[:4]):
        batch_axes = [names.index('b') for names in _AXES]
        lanes = [at_axis(a, d, axis, size)
                 for a, d, axis in zip(operands, dims, batch_axes, strict=True)]
        folded = [a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2:])
                  for a, axis in zip(lanes, batch_axes, strict=True)]
        new, _ = bind(operation, *folded, backend=request, **{**params, 'gradient': 'none'})
        new = new.reshape(lanes[0].shape)
        old, signal = lanes[0], lanes[4]
        new_dim: int | None = 0
    else:                                   # the trace is shared by the lanes, only L differs
        new, _ = bind(operation, *operands[:4], at_axis(operands[4], dims[4], 0, size)[0],
                      backend=request, **{**params, 'gradient': 'none'})
        new_dim, old = None, operands[0][None]
        signal = at_axis(operands[4], dims[4], 0, size)
    total: Any = jnp.zeros((size, *old.shape[2:4]), signal.dtype)
    if gradient != 'none':
        e = (old if gradient == 'entering' else new).astype(signal.dtype)
        total = lax.platform_dependent(signal, e, cuda=_pair_by_state, default=_pair)
    return [new, total], [new_dim, 0]


def _pair(signal: Any, e: Any) -> Any:
    """Of every lane: the sum over batch and states, which a CPU makes in one reduction."""
    return (signal[:, :, None] * e).sum((1, -1))


def _pair_by_state(signal: Any, e: Any) -> Any:
    """The same for a GPU, where a reduction over states would be a kernel of its own."""
    pairs: Any = sum(signal[:, :, None, :, s] * e[..., s] for s in range(e.shape[-1]))
    return pairs.sum(1)


def _cases() -> list[Any]:
    rng = np.random.default_rng(2)
    draw = lambda *shape: np.float32(rng.standard_normal(shape))  # noqa: E731
    return [((draw(3, 17, 36, S), draw(T, 3, 17), draw(T, 3, 36, S), draw(3, 36, S, S),
              draw(3, 36, S)), {'gradient': gradient, 'in_place': in_place})
            for S, T, gradient, in_place in ((1, 4, 'entering', True), (2, 1, 'leaving', True),
                                             (2, 12, 'entering', False))]


D_TRACE_WINDOW = define(Operation(
    name='d_trace_window', arguments=lambda count, **_: _NAMES, reference=_reference, cpu=_cpu,
    axes=_axes, dtypes=_dtypes, kernel=launch.plan, batch=_batch, cases=_cases))


def d_trace_window(trace: Any, inputs: Any, factor: Any, transition: Any, signal: Any, *,
                   gradient: str = 'entering', in_place: bool = True,
                   backend: str | None = None) -> tuple[Any, Any]:
    r"""One pass over the D-RTRL trace for a window, with the gradient that it contributes.

    Parameters
    ----------
    trace : array, ``[B, I, O, S]``
        :math:`e`, in float32, float64, or stored in bfloat16 or float16 (the arithmetic is
        that of the other operands).
    inputs : array, ``[T, B, I]``
        :math:`x_s`.
    factor : array, ``[T, B, O, S]``
        :math:`p_s = D_T \cdots D_{s+1} f_s`.
    transition : array, ``[B, O, S, S]``
        :math:`M = D_T \cdots D_1`.
    signal : array, ``[B, O, S]``
        What the trace is paired with: for a window the ``entering`` result of
        :func:`adjoint_window`.
    gradient : {'entering', 'leaving', 'none'}
        Pair the signal with the trace that enters, with the one that leaves, or not at all.
    in_place : bool
        On a GPU the trace is overwritten where nothing else needs it, and copied first where
        something does (a program whose argument is not donated). ``False``: it is left as it is,
        and :math:`e'` is written beside it.
    backend : {'auto', 'jax', 'triton'}, optional
        Default: ``traceops.settings().backend``.

    Returns
    -------
    trace : array, ``[B, I, O, S]``
        :math:`e' = M e + \sum_s x_s \otimes p_s`.
    gradient : array, ``[I, O]``
        :math:`\sum_b \sum_s \mathrm{signal} \cdot e`.

    Raises
    ------
    ValueError, TypeError
        A shape or a dtype that does not fit; the message names the argument.
    BackendError
        ``backend`` is named and cannot run here.
    """
    if gradient not in ('entering', 'leaving', 'none'):
        raise ValueError(f"d_trace_window: `gradient` is {gradient!r}; it takes 'entering', "
                         "'leaving' or 'none', e.g. gradient='entering'.")
    new, total = bind(D_TRACE_WINDOW, join(trace), inputs, join(factor), join_rows(transition),
                      join(signal), backend=backend, gradient=gradient, in_place=in_place)
    return new, total


def d_trace_start(inputs: Any, factor: Any, *, backend: str | None = None) -> Any:
    r"""The D-RTRL trace after a window that started from zero: a batched matrix product.

    Parameters
    ----------
    inputs : array, ``[T, B, I]``
        :math:`x_s`.
    factor : array, ``[T, B, O, S]``
        :math:`p_s = D_T \cdots D_{s+1} f_s`.
    backend : {'auto', 'jax', 'triton'}, optional
        Default: ``traceops.settings().backend``.

    Returns
    -------
    array, ``[B, I, O, S]``
        :math:`\sum_s x_s \otimes p_s`.
    """
    inputs, factor = jnp.asarray(inputs), join(factor)
    T, B, O, S = factor.shape  # noqa: E741
    if T == 1:
        return _start(inputs, factor)
    new = trace_gradient(inputs, factor.reshape(T, B, O * S), by_sample=True, backend=backend)
    return new.reshape(B, inputs.shape[2], O, S)


def d_trace_update(trace: Any, inputs: Any, factor: Any, jacobian: Any, signal: Any, *,
                   backend: str | None = None) -> tuple[Any, Any]:
    r"""One step of D-RTRL: the trace update fused with the gradient of the step.

    Parameters
    ----------
    trace : array, ``[B, I, O, S]``
        :math:`e_{t-1}`.
    inputs : array, ``[B, I]``
        :math:`x_t`.
    factor, signal : array, ``[B, O, S]``
        :math:`f_t` and :math:`L_t`.
    jacobian : array, ``[B, O, S, S]``
        :math:`D_t`.
    backend : {'auto', 'jax', 'triton'}, optional
        Default: ``traceops.settings().backend``.

    Returns
    -------
    trace : array, ``[B, I, O, S]``
        :math:`e_t = D_t e_{t-1} + x_t \otimes f_t`.
    gradient : array, ``[I, O]``
        :math:`\sum_b L_t \cdot e_t`.
    """
    return d_trace_window(trace, jnp.asarray(inputs)[None], join(factor)[None], jacobian, signal,
                          gradient='leaving', backend=backend)
