# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Outputs that are summed over steps, computed from stacks of all steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from traceops.compiler.jaxpr import reached

__all__ = ['StepSums']

#: Linear in their only operand: the sum over steps may be taken before or after.
_LINEAR = frozenset(
    'broadcast_in_dim convert_element_type copy neg reduce_sum reshape squeeze transpose'.split())


class StepSums:
    """Sums over steps, taken as early as linearity allows.

    Parameters
    ----------
    eqns : sequence of equations
        What is recomputed of all steps, in order.
    varying : iterable of variables
        What they read that is not loop-invariant.
    summed : iterable of variables
        The outputs that are summed over steps.

    Attributes
    ----------
    needed, fixed : list of variables
        Variables whose stacks are needed, and loop-invariant ones.
    """

    def __init__(self, eqns: Sequence[Any], varying: Iterable[Any], summed: Iterable[Any]) -> None:
        self.producer = {v: e for e in eqns for v in e.outvars}
        self.varies = reached(eqns, varying)
        self.needed: list[Any] = []
        self.fixed: list[Any] = []
        for v in summed:
            self._collect(v)

    def vary(self, var: Any) -> bool:
        """Whether a variable differs from step to step."""
        return not isinstance(var, Literal) and var in self.varies

    def _way(self, var: Any) -> str:
        """How to sum a variable: from sums of operands, as one product, or from its own stack."""
        eqn = self.producer.get(var) if self.vary(var) else None
        if eqn is None:
            return 'itself'
        name, vary = eqn.primitive.name, [self.vary(v) for v in eqn.invars]
        if not jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact):
            return 'itself'
        if name in _LINEAR or (name in ('add', 'add_any', 'sub') and all(vary)):
            return 'sums'
        if (name in ('mul', 'dot_general') and sum(vary) == 1) or (
                name == 'div' and vary == [True, False]):
            return 'sums'
        return 'product' if name == 'dot_general' else 'itself'

    def _collect(self, var: Any) -> None:
        way = self._way(var)
        if way == 'itself':
            self.needed += [] if var in self.needed else [var]
            return
        for v in self.producer[var].invars:
            if not self.vary(v):
                self.fixed += [] if isinstance(v, Literal) or v in self.fixed else [v]
            elif way == 'sums':
                self._collect(v)
            else:
                self.needed += [] if v in self.needed else [v]

    def of(self, var: Any, stacks: dict[Any, Any], fixed: dict[Any, Any]) -> Any:
        way = self._way(var)
        if way == 'itself':
            return stacks[var].sum(0).astype(var.aval.dtype)
        eqn = self.producer[var]
        if way == 'sums':
            operands = [self.of(v, stacks, fixed) if self.vary(v)
                        else v.val if isinstance(v, Literal) else fixed[v] for v in eqn.invars]
            return eqn.primitive.bind(*operands, **eqn.params)
        contracted, batch = eqn.params['dimension_numbers']
        later = [tuple(d + 1 for d in dims) for dims in (*contracted, *batch)]
        numbers = (((0, *later[0]), (0, *later[1])), (later[2], later[3]))
        return eqn.primitive.bind(*(stacks[v] for v in eqn.invars),
                                  **{**eqn.params, 'dimension_numbers': numbers})
