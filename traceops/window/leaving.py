# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The trace that leaves a window, as the factors of one rank-T update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ['leaving_factors']


def leaving_factors(
    jacobian: Sequence[Sequence[Any]],
    factors: Sequence[Sequence[Any]],
    kappa: float | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    r"""Factors of :math:`e_T = M e_0 + \sum_s x_s \otimes (P_s f_s)`, without the trace.

    :math:`P_s = D_T \cdots D_{s+1}` and :math:`M = P_1 D_1`. With ``kappa`` the sum over the
    steps of the filtered trace is folded in: :math:`P_{s-1} = \kappa^{T-s+1} I + P_s D_s`,
    which gives :math:`\bar e_T - \kappa^T \bar e_0` in the same form.

    Parameters
    ----------
    jacobian : S sequences of S arrays, ``[T, ...]``
        :math:`D_t`, row by row.
    factors : sequence (one entry per relation) of S arrays, ``[T, ...]``
        :math:`f_t`.
    kappa : float, optional
        Low-pass coefficient of the trace.

    Returns
    -------
    leaving : tuple (one entry per relation) of tuples of S arrays, ``[T, ...]``
        :math:`P_s f_s`.
    entering : S tuples of S arrays, ``[...]``
        :math:`M`, row by row.
    """
    S = len(jacobian)
    like = jacobian[0][0][0]
    eye = tuple(tuple(jnp.full_like(like, float(i == j)) for j in range(S)) for i in range(S))

    def back(carry: Any, step: Any) -> Any:
        P, weight = carry
        D, fs = step
        out = tuple(tuple(sum(P[i][k] * f[k] for k in range(S)) for i in range(S)) for f in fs)
        PD = [[sum(P[i][k] * D[k][j] for k in range(S)) for j in range(S)] for i in range(S)]
        if kappa is None:
            return (tuple(map(tuple, PD)), weight), (out, None)
        weight = kappa * weight
        P = tuple(tuple(PD[i][j] + (weight if i == j else 0.) for j in range(S))
                  for i in range(S))
        return (P, weight), (out, tuple(map(tuple, PD)))

    one = jnp.ones((), like.dtype)
    (P, _), (leaving, products) = jax.lax.scan(
        back, (eye, one), (jacobian, tuple(map(tuple, factors))), reverse=True)
    entering = P if kappa is None else jax.tree.map(lambda a: a[0], products)
    return leaving, entering
