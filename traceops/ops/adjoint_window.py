# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``adjoint_window``: the reverse scan that replaces the D-RTRL trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from traceops.kernels.adjoint_window import launch
from traceops.kernels.adjoint_window.reference import adjoint_window as _definition
from traceops.ops.checks import positions, ranked, same_dtype
from traceops.ops.primitive import Axes, Operation, bind, define, fold_positions
from traceops.ops.states import (
    every_step,
    flatten,
    join,
    join_rows,
    joined_structs,
    labels,
    unflatten,
)

__all__ = ['ADJOINT_WINDOW', 'adjoint_window']


def _kinds(count: int, states: int) -> str:
    """Of each argument: v has S states, m S x S. ``count`` is that of the operands."""
    relations = (count - states - states ** 2) // states if states else count - 2
    return 'vm' + 'v' * relations


def _arguments(count: int, states: int, **_: Any) -> list[str]:
    kinds = _kinds(count, states)
    return labels(['signal', 'jacobian', *(f'factors[{r}]' for r in range(len(kinds) - 2))],
                  kinds, states)


def _axes(*operands: Any, kappa: float | None, states: int) -> Axes:
    name, trailing = 'adjoint_window', 0 if states else 1
    kinds = _kinds(len(operands), states)
    names = _arguments(len(operands), states)
    place = positions(name, names[0], operands[0], f'[T, ...{", S" * trailing}]', 1 + trailing)
    vector, matrix = ('t', *place, *('s',) * trailing), ('t', *place, *('s', 's2') * trailing)
    if not states and operands[1].shape[-1:] != operands[1].shape[-2:-1]:
        raise ValueError(f'{name}: `jacobian` has shape {operands[1].shape}; its last two axes, '
                         'both of states, differ.')
    axes = [vector if kind == 'v' else matrix for kind in kinds
            for _ in range((states if kind == 'v' else states ** 2) or 1)]
    if states:          # Jacobians and factors that are the same at every step come once
        steps = operands[0].shape[:1]
        axes = [a if i < states or o.shape[:1] != (1,) or steps == (1,) else ('once', *a[1:])
                for i, (a, o) in enumerate(zip(axes, operands, strict=True))]
    for argument, operand, expected in zip(names, operands, axes, strict=True):
        shape = f'[{", ".join(["T", "..."] + ["S"] * (len(expected) - 1 - len(place)))}]'
        ranked(name, argument, operand, shape, len(expected))
    last = (*place, 's')
    results = (*(('t', *place) for _ in kinds[2:]), last, *((last,) if kappa is not None else ()))
    return Axes(operands=tuple(axes), results=results,
                replicated=frozenset({'t', 'once', 's', 's2'}), sizes_known={'s': states})


def _dtypes(*operands: Any, kappa: float | None, states: int) -> list[Any]:
    dtype = same_dtype('adjoint_window', _arguments(len(operands), states), operands)
    return [dtype] * (len(_kinds(len(operands), states)) - 1 + (kappa is not None))


def _reference(*operands: Any, kappa: float | None, states: int) -> Any:
    signal, jacobian, *factors = unflatten(operands, _kinds(len(operands), states), states)
    deltas, entering, filtered = _definition(signal, jacobian, factors, kappa)
    return (*deltas, join(entering), *(() if filtered is None else (join(filtered),)))


def _kernel(*operands: Any, capability: int, kappa: float | None, states: int) -> Any:
    kinds = _kinds(len(operands), states)
    whole = jax.eval_shape(lambda *a: every_step(a), *operands) if states else operands
    call = launch.plan(*joined_structs(whole, kinds, states), capability=capability,
                       kappa=kappa)
    if not states or isinstance(call, str):
        return call

    def prepare(operands: Any) -> Any:
        return [join_rows(a) if kind == 'm' else join(a)
                for a, kind in zip(unflatten(every_step(operands), kinds, states), kinds,
                                   strict=True)]
    return dataclasses.replace(call, prepare=prepare)


def _cases() -> list[Any]:
    rng = np.random.default_rng(0)
    cases: list[Any] = []
    for S, R, kappa in ((1, 1, None), (2, 2, None), (2, 1, 0.8)):
        draw = lambda *shape: np.float32(rng.standard_normal(shape))  # noqa: E731
        cases.append(((draw(5, 3, 67, S), 0.5 * draw(5, 3, 67, S, S),
                       *(draw(5, 3, 67, S) for _ in range(R))), {'kappa': kappa, 'states': 0}))
    return cases


ADJOINT_WINDOW = define(Operation(
    name='adjoint_window', arguments=_arguments, reference=_reference, axes=_axes,
    dtypes=_dtypes, kernel=_kernel, batch=fold_positions, cases=_cases))


def adjoint_window(signal: Any, jacobian: Any, factors: Sequence[Any], *,
                   kappa: float | None = None, backend: str | None = None) -> tuple[Any, ...]:
    r"""Reverse scan of a window: :math:`\lambda_t = L_t + D_{t+1}^\top \lambda_{t+1}`.

    ``...`` is any number of axes of positions, the batch among them. Arrays with a trailing S
    may be given as S arrays ``[T, ...]`` (``jacobian``: S rows of S) instead, which a CPU
    prefers; those of Jacobians and factors that are the same at every step may be ``[1, ...]``.

    Parameters
    ----------
    signal : array, ``[T, ..., S]``
        Learning signal :math:`L_t`.
    jacobian : array, ``[T, ..., S, S]``
        :math:`D_t = \partial h_t / \partial h_{t-1}`.
    factors : sequence of arrays, ``[T, ..., S]``
        :math:`f_t = \partial h_t / \partial y_t`, one per relation that feeds the group.
    kappa : float, optional
        Low-pass of the trace (e-prop): the signal becomes
        :math:`\tilde L_t = L_t + \kappa \tilde L_{t+1}` before the scan.
    backend : {'auto', 'jax', 'triton'}, optional
        Default: ``traceops.settings().backend``.

    Returns
    -------
    deltas : tuple of arrays, ``[T, ...]``
        :math:`\delta_t = \lambda_t \cdot f_t` of every relation.
    entering : array, ``[..., S]``
        :math:`D_1^\top \lambda_1`, which pairs with a trace that enters the window.
    filtered : array, ``[..., S]``
        Only with ``kappa``: :math:`\kappa \tilde L_1`, which pairs with a filtered trace that
        enters.

    Raises
    ------
    ValueError, TypeError
        A shape or a dtype that does not fit; the message names the argument.
    BackendError
        ``backend`` is named and cannot run here.
    """
    operands, states = flatten([signal, jacobian, *factors], 'vm' + 'v' * len(factors))
    out = bind(ADJOINT_WINDOW, *operands, backend=backend, states=states,
               kappa=None if kappa is None else float(kappa))
    count = len(factors)
    return (tuple(out[:count]), *out[count:])
