# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``es_trace_window`` and its one-step form ``es_trace_update``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.kernels.es_trace_window import launch
from traceops.kernels.es_trace_window.reference import es_trace_window as _definition
from traceops.ops import states as layout
from traceops.ops.checks import positions, ranked, same_dtype
from traceops.ops.primitive import Axes, Operation, at_axis, bind, define, fold_positions

__all__ = ['ES_TRACE_WINDOW', 'es_trace_update', 'es_trace_window']

_KINDS = 'vmvv'          # v has S states, m S x S; the correction follows


def _arguments(count: int, states: int, **_: Any) -> list[str]:
    return [*layout.labels(['signal', 'jacobian', 'factor', 'carry'], _KINDS, states), 'correction']


def _axes(*operands: Any, states: int, **decays: float) -> Axes:
    name, trailing = 'es_trace_window', 0 if states else 1
    names = _arguments(len(operands), states)
    place = positions(name, names[0], operands[0], f'[T, ...{", S" * trailing}]', 1 + trailing)
    s, matrix = ('s',) * trailing, ('s', 's2') * trailing
    by_kind = [('t', *place, *s), ('t', *place, *matrix), ('t', *place, *s), (*place, *s)]
    counts = [(states if kind == 'v' else states ** 2) or 1 for kind in _KINDS]
    axes = [a for a, count in zip(by_kind, counts, strict=True) for _ in range(count)]
    axes.append(('t',))
    if states and operands[-1].shape:
        axes = layout.once_axes(axes, operands, operands[-1].shape[0])
    for argument, operand, expected in zip(names, operands, axes, strict=True):
        steps = ['T'] * (expected[:1] in (('t',), ('once',)))
        rest = [*(['...'] if argument != 'correction' else []),
                *['S'] * (len(expected) - len(steps) - len(place))]
        ranked(name, argument, operand, f'[{", ".join([*steps, *rest])}]', len(expected))
    if not states and operands[1].shape[-1] != operands[1].shape[-2]:
        raise ValueError(f'{name}: `jacobian` has shape {operands[1].shape}; its last two axes, '
                         'both of states, differ.')
    return Axes(operands=tuple(axes), results=(('t', *place), place, (*place, 's')),
                replicated=frozenset({'t', 'once', 's', 's2'}), sizes_known={'s': states})


def _dtypes(*operands: Any, states: int, **decays: float) -> list[Any]:
    return [same_dtype('es_trace_window', _arguments(len(operands), states), operands)] * 3


def _reference(*operands: Any, states: int, decay_x: float, decay_f: float) -> Any:
    *given, correction = operands
    filtered, total, carry = _definition(*layout.unflatten(given, _KINDS, states), correction,
                                         decay_x, decay_f)
    return filtered, total, layout.join(carry)


def _kernel(*operands: Any, states: int, **params: Any) -> Any:
    *given, correction = operands
    steps, window = correction.shape[0], given[:len(given) - (states or 1)]
    full = jax.eval_shape(lambda *a: layout.every_step(a, steps), *window) if states else window
    once = layout.once_bits(window, steps, states, states) if states else 0
    structs = layout.joined_structs([*full, *given[len(window):]], _KINDS, states)
    return launch.plan(*structs, correction, separate=states > 0, once=once, **params)


def _batch(operation: Operation, size: int, operands: Sequence[Any], dims: Sequence[Any],
           request: str, params: dict[str, Any]) -> Any:
    """A correction of its own for each lane is folded into the signal."""
    operands, dims = list(operands), list(dims)
    if dims[-1] is not None:
        correction = jnp.moveaxis(operands[-1], dims[-1], 1)          # [T, V]
        for i in range(params['states'] or 1):
            signal = at_axis(operands[i], dims[i], 1, size)
            operands[i] = signal / correction.reshape(
                *correction.shape, *(1,) * (signal.ndim - 2))
            dims[i] = 1
        operands[-1], dims[-1] = jnp.ones_like(correction[:, 0]), None
    return fold_positions(operation, size, operands, dims, request, params)


def _cases() -> list[Any]:
    rng = np.random.default_rng(1)
    draw = lambda *shape: np.float32(rng.standard_normal(shape))  # noqa: E731
    correction = np.linspace(0.3, 1., 5, dtype=np.float32)
    params = {'decay_x': 0.9, 'decay_f': 0.8}
    joined = [((draw(5, 3, 67, S), 0.5 * draw(5, 3, 67, S, S), draw(5, 3, 67, S), draw(3, 67, S),
                correction), {**params, 'states': 0}) for S in (1, 2)]
    separate = (*(0.5 * draw(5, 3, 67) for _ in range(8)), draw(3, 67), draw(3, 67), correction)
    return [*joined, (separate, {**params, 'states': 2})]


ES_TRACE_WINDOW = define(Operation(
    name='es_trace_window', arguments=_arguments, reference=_reference, axes=_axes,
    dtypes=_dtypes, kernel=_kernel, batch=_batch, cases=_cases))


def es_trace_window(signal: Any, jacobian: Any, factor: Any, carry: Any, *, decay_x: float,
                    decay_f: float, correction: Any, backend: str | None = None,
                    ) -> tuple[Any, Any, Any]:
    r"""The output-side factor of ES-D-RTRL over a window, and what it makes of the signal.

    ``...`` is any number of axes of positions. Arrays with a trailing S may be given as S
    arrays (``jacobian``: S rows of S) instead; of those, but not of the carry, some may be
    ``[1, ...]``: the same at every step.

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
    given, states = layout.flatten([signal, jacobian, factor, carry], _KINDS)
    filtered, total, carry = bind(
        ES_TRACE_WINDOW, *given, jnp.asarray(correction, given[0].dtype), backend=backend,
        states=states, decay_x=float(decay_x), decay_f=float(decay_f))
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
    signal = layout.join(signal)[None]
    _, delta, carry = es_trace_window(
        signal, layout.join_rows(jacobian)[None], layout.join(factor)[None], carry, decay_x=0.,
        decay_f=decay_f, correction=jnp.asarray(correction, signal.dtype)[None],
        backend=backend)
    return (delta, carry) if inputs is None else (delta, carry, decay_x * input_carry + inputs)
