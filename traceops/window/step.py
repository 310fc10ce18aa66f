# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A learner's single step as primitives: recognisable in a jaxpr, upstream's program when run.

A :class:`Step` says who takes the step and what it computes; the primitives carry it as a
parameter and know nothing of learners, rules or the operations behind them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from traceops.window.jaxprs import depends_on

__all__ = ['GRADIENT', 'PREVIOUS', 'UPDATE', 'Step', 'step_of']

Lanes = tuple[tuple[bool, ...], ...]


class Step:
    """One operation of a learner's step.

    Parameters
    ----------
    owner : object
        The learner. Compared by identity, as the step itself is.
    function : callable
        ``(**operands) -> results``, a pytree; upstream's own computation.
    operands : dict of str to pytree
        An example, which fixes names, order and structure.
    """

    def __init__(self, owner: Any, function: Callable[..., Any], operands: dict[str, Any]) -> None:
        self.owner, self.function = owner, function
        self.trees = {name: jax.tree.structure(value) for name, value in operands.items()}
        self.result: Any = None
        self._compiled: dict[Lanes, Callable[..., Any]] = {}

    def split(self, flat: Sequence[Any]) -> dict[str, list[Any]]:
        """Leaves of each operand."""
        parts, start = {}, 0
        for name, tree in self.trees.items():
            parts[name] = list(flat[start:start + tree.num_leaves])
            start += tree.num_leaves
        return parts

    def unflatten(self, flat: Sequence[Any]) -> dict[str, Any]:
        """The operands, each in its structure."""
        return {name: self.trees[name].unflatten(leaves)
                for name, leaves in self.split(flat).items()}

    def over(self, lanes: Lanes) -> Callable[..., Any]:
        """The function of flat operands, mapped over each level of lanes, outermost first."""
        if lanes not in self._compiled:
            fn: Callable[..., Any] = self._flat
            for mapped in reversed(lanes):
                fn = jax.vmap(fn, in_axes=[0 if m else None for m in mapped])
            # inlined: the caller's program is upstream's, and tracing happens once
            self._compiled[lanes] = jax.jit(fn, inline=True)
        return self._compiled[lanes]

    def _flat(self, *flat: Any) -> list[Any]:
        leaves, self.result = jax.tree.flatten(self.function(**self.unflatten(flat)))
        return leaves

    def bind(self, primitive: Primitive, **operands: Any) -> Any:
        """Take the step: the results, in their structure."""
        flat = [jnp.asarray(leaf) for name in self.trees for leaf in jax.tree.leaves(
            operands[name])]
        out = primitive.bind(*flat, step=self, lanes=())
        return self.result.unflatten(out)


def _abstract(*avals: Any, step: Step, lanes: Lanes) -> Any:
    return list(jax.make_jaxpr(step.over(lanes))(*avals).out_avals)


def _eager(*operands: Any, step: Step, lanes: Lanes) -> Any:
    return step.over(lanes)(*operands)


def _jvp(primals: Any, tangents: Any, *, step: Step, lanes: Lanes) -> Any:
    return jax.jvp(step.over(lanes), tuple(primals),
                   tuple(ad.instantiate_zeros(t) for t in tangents))


def _lower(ctx: Any, *operands: Any, step: Step, lanes: Lanes) -> Any:
    return mlir.lower_fun(step.over(lanes), multiple_results=True)(ctx, *operands)


def _primitive(name: str) -> Primitive:
    primitive = Primitive(f'etp_{name}')
    primitive.multiple_results = True

    def batch(operands: Any, dims: Any, *, step: Step, lanes: Lanes) -> Any:
        mapped = tuple(d is not None for d in dims)
        moved = [a if d is None else jnp.moveaxis(a, d, 0)
                 for a, d in zip(operands, dims, strict=True)]
        out = primitive.bind(*moved, step=step, lanes=(mapped, *lanes))
        if all(m for name, part in step.split(mapped).items() for m in part
               if name not in ('index', 'weights')):
            return out, [0] * len(out)
        # what no mapped operand reaches is the same in every lane, and not to be summed over them
        one = [jax.ShapeDtypeStruct(a.shape[m:], a.dtype)
               for a, m in zip(moved, mapped, strict=True)]
        closed = jax.make_jaxpr(step.over(lanes))(*one)
        reached = [depends_on(closed, i, [j for j, m in enumerate(mapped) if m])
                   for i in range(len(out))]
        return [a if r else a[0] for a, r in zip(out, reached, strict=True)], [
            0 if r else None for r in reached]

    primitive.def_abstract_eval(_abstract)
    primitive.def_impl(_eager)
    ad.primitive_jvps[primitive] = _jvp
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, _lower)
    return primitive


#: The trace of this step from the trace of the last one.
UPDATE = _primitive('step_update')
#: Weight gradients from the trace of this step and a learning signal.
GRADIENT = _primitive('step_gradient')
#: The same from the trace of the last step (an output that reads the previous hidden value).
PREVIOUS = _primitive('step_previous_gradient')


@functools.cache
def _primitives() -> frozenset[Primitive]:
    return frozenset((UPDATE, GRADIENT, PREVIOUS))


def step_of(eqn: Any) -> Step | None:
    """The step that an equation takes, if it takes one."""
    return eqn.params['step'] if eqn.primitive in _primitives() else None
