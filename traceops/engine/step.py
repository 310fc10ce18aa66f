# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A learner's single step as primitives: visible in a jaxpr, upstream's program when run.

A :class:`Step` says who takes the step and what it computes; the primitives carry it as a
parameter and know nothing of learners, rules or the operations behind them. A step may say how
to take it with the kernels of :mod:`traceops.ops` on a GPU that they serve.

What is a parameter of a primitive stays in jax's caches long after its learner: a step owns
programs, and no learner.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from traceops.compiler.jaxpr import depends_on
from traceops.ops import choice
from traceops.ops.primitive import compiled_call

__all__ = ['GRADIENT', 'PREVIOUS', 'UPDATE', 'Step', 'step_of']

Lanes = tuple[tuple[bool, ...], ...]


class Step:
    """One operation of a learner's step.

    Parameters
    ----------
    owner : object
        The learner, of which the step keeps a weak reference. Compared by identity, as the step
        itself is.
    program : ClosedJaxpr
        Of the leaves of all operands: upstream's own computation.
    trees : dict of str to PyTreeDef
        Names, order and structure of the operands.
    result : PyTreeDef
        Structure of the results.
    fused : ClosedJaxpr, optional
        The same as ``program``, through operations that have kernels.
    served : callable, optional
        ``(place) -> bool``: whether they serve it there; with ``fused``.
    by_sample : ClosedJaxpr, optional
        The same as ``program``, a sample at a time: for a CPU, where it is not mapped over lanes.
    """

    def __init__(self, owner: Any, program: ClosedJaxpr, trees: dict[str, Any], result: Any,
                 fused: ClosedJaxpr | None = None,
                 served: Callable[[choice.Place], bool] | None = None,
                 by_sample: ClosedJaxpr | None = None) -> None:
        self._owner = weakref.ref(owner)
        self.program, self.trees, self.result = program, trees, result
        self.served, self.programs = served, {'fused': fused, 'by_sample': by_sample}
        self._mapped: dict[Any, Callable[..., Any]] = {}

    @property
    def owner(self) -> Any:
        """The learner, or ``None`` if only a program that it was part of is left."""
        return self._owner()

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

    def over(self, lanes: Lanes, way: str = '') -> Callable[..., Any]:
        """The function of flat operands, mapped over each level of lanes, outermost first.

        ``way``: ``'fused'`` or ``'by_sample'``, where there is such a program.
        """
        if (lanes, way) not in self._mapped:
            program = self.programs.get(way)
            fn: Callable[..., Any] = jaxpr_as_fun(self.program if program is None else program)
            for mapped in reversed(lanes):
                fn = jax.vmap(fn, in_axes=[0 if m else None for m in mapped])
            # inlined: the caller's program is upstream's, and tracing happens once
            self._mapped[lanes, way] = jax.jit(fn, inline=True)
        return self._mapped[lanes, way]

    def bind(self, primitive: Primitive, flat: Sequence[Any]) -> Any:
        """Take the step: the results, in their structure."""
        devices = None if self.programs['fused'] is None else choice.devices_needed()
        out = primitive.bind(*flat, step=self, lanes=(), devices=devices)
        return self.result.unflatten(out)


def _abstract(*avals: Any, step: Step, lanes: Lanes, devices: Any) -> Any:
    return list(jax.make_jaxpr(step.over(lanes))(*avals).out_avals)


def _jvp(primals: Any, tangents: Any, *, step: Step, lanes: Lanes, devices: Any) -> Any:
    return jax.jvp(step.over(lanes), tuple(primals),
                   tuple(ad.instantiate_zeros(t) for t in tangents))


def _lower(ctx: Any, *operands: Any, step: Step, lanes: Lanes, devices: Any) -> Any:
    return mlir.lower_fun(step.over(lanes), multiple_results=True)(ctx, *operands)


def _lower_for_cuda(ctx: Any, *operands: Any, step: Step, lanes: Lanes, devices: Any) -> Any:
    fused = step.served is not None and step.served(choice.place(ctx, 'cuda'))
    way = 'fused' if fused else ''
    return mlir.lower_fun(step.over(lanes, way), multiple_results=True)(ctx, *operands)


def _lower_for_cpu(ctx: Any, *operands: Any, step: Step, lanes: Lanes, devices: Any) -> Any:
    # samples that are spread over devices stay where they are: taken one by one they would not
    way = '' if lanes or choice.place(ctx, 'cpu').devices > 1 else 'by_sample'
    return mlir.lower_fun(step.over(lanes, way), multiple_results=True)(ctx, *operands)


def _primitive(name: str) -> Primitive:
    primitive = Primitive(f'etp_{name}')
    primitive.multiple_results = True

    # the primitive itself as a compiled function: the lowering chooses how it is taken
    lowered = jax.jit(primitive.bind, static_argnames=('step', 'lanes', 'devices'))

    def eager(*operands: Any, step: Step, lanes: Lanes, devices: Any) -> Any:
        if devices is None:         # no program for a GPU can be made
            return step.over(lanes)(*operands)
        return compiled_call(functools.partial(lowered, step=step, lanes=lanes, devices=devices),
                             *operands)

    def batch(operands: Any, dims: Any, *, step: Step, lanes: Lanes, devices: Any) -> Any:
        mapped = tuple(d is not None for d in dims)
        moved = [a if d is None else jnp.moveaxis(a, d, 0)
                 for a, d in zip(operands, dims, strict=True)]
        out = primitive.bind(*moved, step=step, lanes=(mapped, *lanes), devices=devices)
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
    primitive.def_impl(eager)
    ad.primitive_jvps[primitive] = _jvp
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, _lower)
    mlir.register_lowering(primitive, _lower_for_cuda, platform='cuda')
    mlir.register_lowering(primitive, _lower_for_cpu, platform='cpu')
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
