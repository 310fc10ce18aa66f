# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``adjoint_window``: the reverse scan that replaces the D-RTRL trace.

The primitive has two forms: ``leaving`` is empty for :func:`adjoint_window`; for
:func:`leaving_window` it is ``'start'`` where nothing enters, else ``'onto'``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from traceops.kernels.adjoint_window import launch
from traceops.kernels.adjoint_window.reference import adjoint_window as _definition
from traceops.kernels.adjoint_window.reference import leaving_window as _leaving_definition
from traceops.kernels.layout import steps_of
from traceops.ops import states as layout
from traceops.ops.checks import positions, ranked, same_dtype
from traceops.ops.primitive import Axes, Operation, bind, define, fold_positions

__all__ = ['ADJOINT_WINDOW', 'adjoint_window', 'leaving_window']


def _kinds(count: int, states: int, leaving: str) -> str:
    """Of each argument: v has S states, m S x S. ``count`` is that of the operands."""
    fixed = 'm' if leaving else 'vm'
    if not states:
        return fixed + 'v' * (count - len(fixed))
    return fixed + 'v' * (count // states - states - (not leaving))


def _arguments(count: int, states: int, leaving: str, **_: Any) -> list[str]:
    kinds = _kinds(count, states, leaving)
    fixed = ['jacobian'] if leaving else ['signal', 'jacobian']
    factors = [f'factors[{r}]' for r in range(len(kinds) - len(fixed))]
    return layout.labels([*fixed, *factors], kinds, states)


def _axes(*operands: Any, kappa: float | None, states: int, leaving: str) -> Axes:
    name, trailing = 'adjoint_window', 0 if states else 1
    kinds = _kinds(len(operands), states, leaving)
    names = _arguments(len(operands), states, leaving)
    fixed = (0 if states else 2 if leaving else 1)
    place = positions(name, names[0], operands[0], f'[T, ...{", S" * fixed}]', 1 + fixed)
    vector, matrix = ('t', *place, *('s',) * trailing), ('t', *place, *('s', 's2') * trailing)
    jacobian = operands[kinds.index('m')]
    if not states and jacobian.shape[-1:] != jacobian.shape[-2:-1]:
        raise ValueError(f'{name}: `jacobian` has shape {jacobian.shape}; its last two axes, '
                         'both of states, differ.')
    axes = [vector if kind == 'v' else matrix for kind in kinds
            for _ in range((states if kind == 'v' else states ** 2) or 1)]
    if states and all(a.shape for a in operands):
        axes = layout.once_axes(axes, operands, steps_of(operands))
    for argument, operand, expected in zip(names, operands, axes, strict=True):
        shape = f'[{", ".join(["T", "..."] + ["S"] * (len(expected) - 1 - len(place)))}]'
        ranked(name, argument, operand, shape, len(expected))
    relations, last = len(kinds) - (1 if leaving else 2), (*place, 's')
    results = ((*(('t', *last) for _ in range(relations)), *(last for _ in range(relations)),
                *(((*last, 's2'),) if leaving == 'onto' else ())) if leaving else
               (*(('t', *place) for _ in range(relations)), last,
                *((last,) if kappa is not None else ())))
    return Axes(operands=tuple(axes), results=results,
                replicated=frozenset({'t', 'once', 's', 's2'}),
                sizes_known={'s': states, 's2': states})


def _dtypes(*operands: Any, kappa: float | None, states: int, leaving: str) -> list[Any]:
    dtype = same_dtype('adjoint_window', _arguments(len(operands), states, leaving), operands)
    count = len(_kinds(len(operands), states, leaving)) - 1
    if leaving:
        return [dtype] * (2 * count + (leaving == 'onto'))
    return [dtype] * (count + (kappa is not None))


def _reference(*operands: Any, kappa: float | None, states: int, leaving: str) -> Any:
    given = layout.unflatten(operands, _kinds(len(operands), states, leaving), states)
    if leaving:
        products, totals, transition = _leaving_definition(given[0], given[1:], kappa)
        return (*products, *totals, *((transition,) if leaving == 'onto' else ()))
    deltas, entering, filtered = _definition(given[0], given[1], given[2:], kappa)
    return (*deltas, layout.join(entering), *(() if filtered is None else (layout.join(filtered),)))


def _kernel(*operands: Any, capability: int, kappa: float | None, states: int,
            leaving: str) -> Any:
    kinds = _kinds(len(operands), states, leaving)
    steps = steps_of(operands)
    full = jax.eval_shape(lambda *a: layout.every_step(a, steps), *operands)
    structs = layout.joined_structs(full, kinds, states)[kinds.index('m'):]
    separate = launch.is_separate(states, len(structs) - 1)
    once = layout.once_bits(operands, steps, states, 0 if leaving else states) if states else 0
    call = launch.plan(*structs, capability=capability, kappa=kappa, leaving=leaving,
                       separate=separate, once=once * separate)
    if not states or separate or isinstance(call, str):
        return call

    def prepare(operands: Any) -> Any:
        given = layout.unflatten(layout.every_step(operands, steps), kinds, states)
        return [layout.join_rows(a) if kind == 'm' else layout.join(a)
                for a, kind in zip(given, kinds, strict=True)]
    return dataclasses.replace(call, prepare=prepare)


def _cases() -> list[Any]:
    rng = np.random.default_rng(0)
    cases: list[Any] = []
    draw = lambda *shape: np.float32(rng.standard_normal(shape))  # noqa: E731
    for S, R, kappa in ((1, 1, None), (2, 2, None), (2, 1, 0.8)):
        cases.append(((draw(5, 3, 67, S), 0.5 * draw(5, 3, 67, S, S),
                       *(draw(5, 3, 67, S) for _ in range(R))),
                      {'kappa': kappa, 'states': 0, 'leaving': ''}))
    separate = [draw(5, 3, 67) for _ in range(8)]          # two states separate, one relation
    for leaving in ('', 'start', 'onto'):
        cases.append((tuple(separate[2 * bool(leaving):]),
                      {'kappa': 0.8, 'states': 2, 'leaving': leaving}))
    return cases


ADJOINT_WINDOW = define(Operation(
    name='adjoint_window', arguments=_arguments, reference=_reference, axes=_axes,
    dtypes=_dtypes, kernel=_kernel, batch=fold_positions, cases=_cases))


def adjoint_window(signal: Any, jacobian: Any, factors: Sequence[Any], *,
                   kappa: float | None = None, backend: str | None = None) -> tuple[Any, ...]:
    r"""Reverse scan of a window: :math:`\lambda_t = L_t + D_{t+1}^\top \lambda_{t+1}`.

    ``...`` is any number of axes of positions, the batch among them. Arrays with a trailing S
    may be given as S arrays ``[T, ...]`` (``jacobian``: S rows of S) instead, which a CPU
    prefers; of those, some may be ``[1, ...]``: the same at every step.

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
    operands, states = layout.flatten([signal, jacobian, *factors], 'vm' + 'v' * len(factors))
    out = bind(ADJOINT_WINDOW, *operands, backend=backend, states=states, leaving='',
               kappa=None if kappa is None else float(kappa))
    count = len(factors)
    return (tuple(out[:count]), *out[count:])


def leaving_window(jacobian: Any, factors: Sequence[Any], *, kappa: float | None = None,
                   start: bool = False, backend: str | None = None,
                   ) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    r"""What a D-RTRL trace that leaves a window is made of: :func:`adjoint_window`'s scan, for the
    adjoint of every state after the last step.

    Parameters
    ----------
    jacobian, factors, kappa, backend
        As in :func:`adjoint_window`; at least one step.
    start : bool
        Nothing enters: the transition is not asked for.

    Returns
    -------
    products : tuple of arrays, ``[T, ..., S]``
        :math:`p_s = D_T \cdots D_{s+1} f_s` of every relation.
    totals : tuple of arrays, ``[..., S]``
        :math:`\sum_s p_s` of every relation, the trace of a bias.
    transition : array, ``[..., S, S]``, or None
        :math:`M = D_T \cdots D_1`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As :func:`adjoint_window`.
    """
    operands, states = layout.flatten([jacobian, *factors], 'm' + 'v' * len(factors))
    out = bind(ADJOINT_WINDOW, *operands, backend=backend, states=states,
               leaving='start' if start else 'onto',
               kappa=None if kappa is None else float(kappa))
    count = len(factors)
    return tuple(out[:count]), tuple(out[count:2 * count]), None if start else out[-1]
