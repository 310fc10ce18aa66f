# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Each rule in NumPy and float64, from its definition: what upstream alone cannot tell.

A *record* is of one step: the input ``x [B, I]`` of every op, its factors ``f [B, O, S]``
(``dh/dy``), the Jacobian ``D [B, O, S, S]`` (``dh_t/dh_{t-1}``) and the learning signal
``L [B, O, S]`` (``dloss/dh_t``). A rule returns the sum of the gradients of the steps of every op,
``[I, O]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ['RULES', 'd_rtrl', 'eprop', 'es_d_rtrl', 'records']


def d_rtrl(records: list[dict[str, Any]], kappa: float = 0.) -> dict[str, Any]:
    r""":math:`e_t = D_t e_{t-1} + x_t \otimes f_t`, low-passed with :math:`\kappa`."""
    total = {}
    for op in records[0]['x']:
        e, low, total[op] = 0., 0., 0.
        for now in records:
            x, f, D = now['x'][op], now['f'][op], now['D']
            instant = np.einsum('bi,bos->bios', x, f)
            e = instant + (np.einsum('bosr,bior->bios', D, e) if np.ndim(e) else 0.)
            low = kappa * low + e
            total[op] = total[op] + np.einsum('bos,bios->io', now['L'], low)
    return total


def eprop(records: list[dict[str, Any]]) -> dict[str, Any]:
    """D-RTRL with a low-pass of the trace."""
    return d_rtrl(records, kappa=0.7)


def es_d_rtrl(records: list[dict[str, Any]], decay: float = 0.9) -> dict[str, Any]:
    r"""Two vectors for the trace: :math:`\bar x_t` and :math:`\bar f_t / c_t`, both low-passed.

    :math:`\bar f_t = \alpha D_t \bar f_{t-1} + (1 - \alpha) f_t`,
    :math:`\bar x_t = \alpha \bar x_{t-1} + x_t`, :math:`c_t = 1 - \alpha^{t}`.
    """
    total = {}
    for op in records[0]['x']:
        x, f, total[op] = 0., 0., 0.
        for t, now in enumerate(records, 1):
            x = decay * x + now['x'][op]
            carried = np.einsum('bosr,bor->bos', now['D'], f) if np.ndim(f) else 0.
            f = decay * carried + (1 - decay) * now['f'][op]
            delta = (now['L'] * f).sum(-1) / (1 - decay ** t)
            total[op] = total[op] + np.einsum('bi,bo->io', x, delta)
    return total


RULES: dict[str, Callable[..., dict[str, Any]]] = {
    'd_rtrl': d_rtrl, 'es': es_d_rtrl, 'eprop': eprop}


def records(inputs: Callable[..., Any], neuron: Callable[..., Any], loss: Callable[..., Any],
            weights: dict[str, Any], states: Any, xs: Any, ys: Any) -> list[dict[str, Any]]:
    """The records of a layer, its derivatives one by one (call it in float64).

    Parameters
    ----------
    inputs : callable
        ``(x, states) -> {op: input [B, I]}``.
    neuron : callable
        ``(states, {op: current [B, O]}) -> states``, position by position; ``[B, O]`` each.
    loss : callable
        ``(states, y) -> scalar``.
    weights : dict of arrays, ``[I, O]``
    states : sequence of S arrays, ``[B, O]``
    """
    found, states = [], tuple(states)
    ones = jnp.ones_like(states[0])

    def along(function: Callable[..., Any], at: Any, key: Any) -> Any:
        """The derivative by one array, of whose elements each has its own position."""
        tangent = jax.tree.map(jnp.zeros_like, at)
        tangent = {**tangent, key: ones} if isinstance(at, dict) else tuple(
            ones if i == key else a for i, a in enumerate(tangent))
        return np.stack(jax.jvp(function, (at,), (tangent,))[1], -1)

    for x, y in zip(xs, ys, strict=True):
        of_op = {op: np.asarray(a) for op, a in inputs(x, states).items()}
        current = {op: jnp.asarray(a @ np.asarray(weights[op])) for op, a in of_op.items()}
        before, currents = states, current
        D = [along(lambda s, c=currents: neuron(s, c), before, j) for j in range(len(before))]
        f = {op: along(lambda c, s=before: neuron(s, c), current, op) for op in current}
        states = tuple(neuron(before, current))
        L = jax.grad(lambda s, y=y: loss(s, y))(states)
        found.append({'x': of_op, 'f': f, 'D': np.stack(D, -1), 'L': np.stack(L, -1)})
    return found
