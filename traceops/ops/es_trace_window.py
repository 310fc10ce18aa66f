# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``es_trace_window`` and its one-step form ``es_trace_update``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from traceops.kernels.es_trace_window import launch
from traceops.kernels.es_trace_window.reference import es_trace_window as _definition
from traceops.ops.checks import positions, ranked, same_dtype
from traceops.ops.primitive import Axes, Operation, at_axis, bind, define, fold_positions
from traceops.ops.states import join, join_rows

__all__ = ['ES_TRACE_WINDOW', 'es_trace_update', 'es_trace_window']

_NAMES = ('signal', 'jacobian', 'factor', 'carry', 'correction')


def _axes(signal: Any, jacobian: Any, factor: Any, carry: Any, correction: Any,
          **decays: float) -> Axes:
    name = 'es_trace_window'
    place = positions(name, 'signal', signal, '[T, ..., S]', 2)
    ranked(name, 'jacobian', jacobian, '[T, ..., S, S]', len(place) + 3)
    ranked(name, 'factor', factor, '[T, ..., S]', len(place) + 2)
    ranked(name, 'carry', carry, '[..., S]', len(place) + 1)
    ranked(name, 'correction', correction, '[T]', 1)
    if jacobian.shape[-1] != jacobian.shape[-2]:
        raise ValueError(f'{name}: `jacobian` has shape {jacobian.shape}; its last two axes, '
                         'both of states, differ.')
    vectors = ('t', *place, 's')
    return Axes(operands=(vectors, ('t', *place, 's', 's2'), vectors, (*place, 's'), ('t',)),
                results=(('t', *place), place, (*place, 's')),
                replicated=frozenset({'t', 's', 's2'}))


def _dtypes(*operands: Any, **decays: float) -> list[Any]:
    return [same_dtype('es_trace_window', _NAMES, operands)] * 3


def _reference(signal: Any, jacobian: Any, factor: Any, carry: Any, correction: Any, *,
               decay_x: float, decay_f: float) -> Any:
    filtered, total, carry = _definition(signal, jacobian, factor, carry, correction,
                                         decay_x, decay_f)
    return filtered, total, join(carry)


def _batch(operation: Operation, size: int, operands: Sequence[Any], dims: Sequence[Any],
           request: str, params: dict[str, Any]) -> Any:
    """A correction of its own for each lane is folded into the signal."""
    operands, dims = list(operands), list(dims)
    if dims[4] is not None:
        correction = jnp.moveaxis(operands[4], dims[4], 1)          # [T, V]
        signal = at_axis(operands[0], dims[0], 1, size)
        operands[0] = signal / correction.reshape(*correction.shape, *(1,) * (signal.ndim - 2))
        operands[4] = jnp.ones_like(correction[:, 0])
        dims[0], dims[4] = 1, None
    return fold_positions(operation, size, operands, dims, request, params)


def _cases() -> list[Any]:
    rng = np.random.default_rng(1)
    draw = lambda *shape: np.float32(rng.standard_normal(shape))  # noqa: E731
    return [((draw(5, 3, 67, S), 0.5 * draw(5, 3, 67, S, S), draw(5, 3, 67, S), draw(3, 67, S),
              np.linspace(0.3, 1., 5, dtype=np.float32)), {'decay_x': 0.9, 'decay_f': 0.8})
            for S in (1, 2)]


ES_TRACE_WINDOW = define(Operation(
    name='es_trace_window', arguments=lambda count, **_: _NAMES, reference=_reference, axes=_axes,
    dtypes=_dtypes, kernel=launch.plan, batch=_batch, cases=_cases))


def es_trace_window(signal: Any, jacobian: Any, factor: Any, carry: Any, *, decay_x: float,
                    decay_f: float, correction: Any, backend: str | None = None,
                    ) -> tuple[Any, Any, Any]:
    r"""The output-side factor of ES-D-RTRL over a window, and what it makes of the signal.

    ``...`` is any number of axes of positions. Arrays with a trailing S may be given as S
    arrays (``jacobian``: S rows of S) instead.

    Parameters
    ----------
    signal, factor : array, ``[T, ..., S]``
        :math:`L_t` and :math:`f_t`.
    jacobian : array, ``[T, ..., S, S]``
        :math:`D_t`.
    carry : array, ``[..., S]``
        :math:`g_0`, the factor that enters.
    decay_x, decay_f : float
        :math:`\alpha_x`, :math:`\alpha_f`.
    correction : array, ``[T]``
        Warm-up correction :math:`c_t` of every step.
    backend : {'auto', 'jax', 'triton'}, optional
        Default: ``traceops.settings().backend``.

    Returns
    -------
    filtered : array, ``[T, ...]``
        :math:`r_t = (g_t \cdot L_t)/c_t + \alpha_x r_{t+1}` with
        :math:`g_t = \alpha_f D_t g_{t-1} + (1-\alpha_f) f_t`.
    total : array, ``[...]``
        :math:`\sum_t (g_t \cdot L_t)/c_t`, the gradient of a bias.
    carry : array, ``[..., S]``
        :math:`g_T`.

    Raises
    ------
    ValueError, TypeError
        A shape or a dtype that does not fit; the message names the argument.
    BackendError
        ``backend`` is named and cannot run here.
    """
    signal = join(signal)
    filtered, total, carry = bind(
        ES_TRACE_WINDOW, signal, join_rows(jacobian), join(factor), join(carry),
        jnp.asarray(correction, signal.dtype), backend=backend,
        decay_x=float(decay_x), decay_f=float(decay_f))
    return filtered, total, carry


def es_trace_update(signal: Any, jacobian: Any, factor: Any, carry: Any, *, decay_f: float,
                    correction: Any = 1., inputs: Any = None, input_carry: Any = None,
                    decay_x: float = 0., backend: str | None = None) -> tuple[Any, ...]:
    r"""One step of ES-D-RTRL: both factors, and the product with the learning signal.

    Parameters
    ----------
    signal, factor, carry : array, ``[..., S]``
        :math:`L_t`, :math:`f_t`, :math:`g_{t-1}`.
    jacobian : array, ``[..., S, S]``
        :math:`D_t`.
    decay_f, decay_x : float
        :math:`\alpha_f` and :math:`\alpha_x`.
    correction : scalar
        Warm-up correction :math:`c_t`.
    inputs, input_carry : array, ``[..., I]``, optional
        :math:`x_t` and :math:`a_{t-1}`: with them the input-side factor is advanced too.
    backend : {'auto', 'jax', 'triton'}, optional
        Default: ``traceops.settings().backend``.

    Returns
    -------
    delta : array, ``[...]``
        :math:`(g_t \cdot L_t)/c_t`, the operand of the weight gradient beside :math:`a_t`.
    carry : array, ``[..., S]``
        :math:`g_t = \alpha_f D_t g_{t-1} + (1-\alpha_f) f_t`.
    input_carry : array, ``[..., I]``
        Only with ``inputs``: :math:`a_t = \alpha_x a_{t-1} + x_t`.
    """
    if (inputs is None) != (input_carry is None):
        raise TypeError('es_trace_update: `inputs` and `input_carry` go together; give both, '
                        'or neither.')
    signal = join(signal)[None]
    _, delta, carry = es_trace_window(
        signal, join_rows(jacobian)[None], join(factor)[None], carry, decay_x=0.,
        decay_f=decay_f, correction=jnp.asarray(correction, signal.dtype)[None],
        backend=backend)
    return (delta, carry) if inputs is None else (delta, carry, decay_x * input_carry + inputs)
