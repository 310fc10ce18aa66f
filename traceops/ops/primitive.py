# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""An operation as a JAX primitive: one description, every rule derived from it.

The axes of the operands are named. Shape checks, the sharding rule and the partitioned program
follow from the names; differentiation goes through the reference.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from traceops.kernels.launch import KernelCall
from traceops.ops import choice

__all__ = ['Axes', 'Operation', 'at_axis', 'bind', 'compiled_call', 'define', 'fold_positions',
           'lane_count']

Shaped = Any            # anything with .shape and .dtype
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the axes of every operand and result.

    Attributes
    ----------
    operands, results : tuple of tuples of str
        One name an axis; the same name, the same size.
    replicated : frozenset of str
        Axes that a device needs whole (time, states).
    summed : tuple of str
        Axes that results without them are sums over (the batch).
    sizes_known : mapping of str to int
        Sizes of axes that no operand has.
    """

    operands: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]
    replicated: frozenset[str]
    summed: tuple[str, ...] = ()
    sizes_known: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Operation:
    """All that is particular to one operation.

    Attributes
    ----------
    name : str
        As in ``traceops.kernels.<name>``.
    arguments : callable
        ``(number of operands, **params) -> names``, for messages.
    reference : callable
        ``(*operands, **params) -> tuple``: the definition, in plain JAX.
    axes : callable
        ``(*operands, **params) -> Axes``; raises for a wrong rank.
    dtypes : callable
        ``(*operands, **params) -> dtypes of the results``; raises for a wrong dtype.
    kernel : callable
        ``(operands, capability, **params) -> KernelCall``, or a str: why there is none.
    batch : callable
        ``(operation, size, operands, dims, request, params) -> results, dims``.
    cases : callable
        ``() -> [(operands, params), ...]``: what a kernel is tried on before it is used.
    cpu : callable, optional
        ``(*operands, alone, **params) -> tuple``: the reference as a CPU is quickest with it;
        ``alone``: no other device shares the call.
    addend : int, optional
        Operand, the last, that is only added to the first result and may be left out. Where
        devices share a sum, it enters after theirs.
    shared : str
        Why the automatic choice leaves a call that several devices share to XLA; empty where it
        does not.
    variant : callable, optional
        ``(**params) -> str``: which of several kernels it is, each of which is tried before use.
    trial : callable, optional
        ``(operation, operands, params, device) -> (whether a kernel is right, what was found)``,
        instead of a comparison on the ``cases``.
    measured_as : callable, optional
        ``(*operands, **params) -> keys`` under which a call was measured on a device, the most
        exact first (see :mod:`traceops.ops.measured`).
    """

    name: str
    arguments: Callable[..., Sequence[str]]
    reference: Callable[..., tuple[Any, ...]]
    axes: Callable[..., Axes]
    dtypes: Callable[..., Sequence[Any]]
    kernel: Callable[..., KernelCall | str]
    batch: Callable[..., Any]
    cases: Callable[[], Sequence[tuple[tuple[Any, ...], Params]]]
    cpu: Callable[..., tuple[Any, ...]] | None = None
    addend: int | None = None
    shared: str = ''
    variant: Callable[..., str] | None = None
    trial: Callable[..., tuple[bool, str]] | None = None
    measured_as: Callable[..., Sequence[str]] | None = None

    @functools.cached_property
    def primitive(self) -> Primitive:
        """The primitive, named as upstream names its own."""
        primitive = Primitive(f'etp_{self.name}')
        primitive.multiple_results = True
        return primitive

    def results(self, operands: Sequence[Shaped], params: Params) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the results; raises where the operands do not fit."""
        axes = self.axes(*operands, **params)
        names = self.arguments(len(operands), **params)
        known: dict[str, tuple[int, str]] = {}
        for argument, axis_names, a in zip(names, axes.operands, operands, strict=True):
            for axis, size in zip(axis_names, a.shape, strict=True):
                expected, source = known.setdefault(axis, (size, argument))
                if size != expected:
                    shape = ', '.join(axis_names)
                    raise ValueError(
                        f'{self.name}: `{argument}` has shape {a.shape}; it is [{shape}], and '
                        f'{axis} is {expected} in `{source}`.')
        sizes = {**axes.sizes_known, **{name: size for name, (size, _) in known.items()}}
        return [jax.ShapeDtypeStruct(tuple(sizes[n] for n in r), d) for r, d in
                zip(axes.results, self.dtypes(*operands, **params), strict=True)]


OPERATIONS: dict[str, Operation] = {}


def define(operation: Operation) -> Operation:
    """Register the rules of an operation's primitive."""
    OPERATIONS[operation.name] = operation
    p = operation.primitive

    def abstract(*avals: Any, request: str, devices: Any, **params: Any) -> Any:
        results = operation.results(avals, params)
        if all(a.sharding.mesh.empty for a in avals):
            return [jax.core.ShapedArray(r.shape, r.dtype) for r in results]
        # inside shard_map, or with explicit shardings: how results vary is the reference's to say
        traced = jax.make_jaxpr(functools.partial(operation.reference, **params))(*avals)
        return list(traced.out_avals)

    def jvp(primals: Any, tangents: Any, *, request: str, devices: Any, **params: Any) -> Any:
        reference = functools.partial(operation.reference, **params)
        tangents = [ad.instantiate_zeros(t) for t in tangents]
        _, out = jax.jvp(reference, tuple(primals), tuple(tangents))
        return p.bind(*primals, request=request, devices=devices, **params), out

    def batch(operands: Any, dims: Any, *, request: str, devices: Any, **params: Any) -> Any:
        size = lane_count(operands, dims)
        return operation.batch(operation, size, operands, dims, request, params)

    def eager(*operands: Any, **params: Any) -> Any:
        return compiled_call(
            _jitted(p, tuple(sorted(params.items(), key=lambda kv: kv[0]))), *operands)

    p.def_abstract_eval(abstract)
    p.def_impl(eager)
    ad.primitive_jvps[p] = jvp
    batching.primitive_batchers[p] = batch
    for platform in (None, 'cpu', 'cuda'):
        mlir.register_lowering(p, _lowering(operation, platform), platform=platform)
    return operation


@functools.lru_cache(maxsize=256)
def _jitted(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(primitive.bind, **dict(params)))


def compiled_call(function: Callable[..., Any], *operands: Any) -> Any:
    """A primitive outside of a program is a program of its own, whatever ``jax.disable_jit`` says
    of functions: so it is with jax's.
    """
    with jax.disable_jit(False):
        return function(*operands)


def bind(operation: Operation, *operands: Any, backend: str | None = None,
         **params: Any) -> list[Any]:
    """Call the operation; ``backend`` as in :func:`traceops.ops.choice.requested`."""
    return operation.primitive.bind(
        *map(jnp.asarray, operands), request=choice.requested(backend),
        devices=choice.devices_needed(), **params)


def _lowering(operation: Operation, platform: str | None) -> Callable[..., Any]:
    def rule(ctx: Any, *operands: Any, request: str, devices: Any, **params: Any) -> Any:
        where = choice.place(ctx, platform)
        reference = functools.partial(operation.reference, **params)
        if platform == 'cpu' and operation.cpu is not None:
            reference = functools.partial(operation.cpu, alone=where.devices == 1, **params)
        decision = choice.decide(operation, ctx.avals_in, params, request, where)
        if decision.backend == 'jax':
            return mlir.lower_fun(reference, multiple_results=True)(ctx, *operands)
        kernel = choice.runner(operation, params, where)
        try:
            return mlir.lower_fun(kernel, multiple_results=True)(ctx, *operands)
        except Exception as err:
            # raises for a named backend
            choice.failed(operation, request, where, err, params)
            return mlir.lower_fun(reference, multiple_results=True)(ctx, *operands)
    return rule


def lane_count(operands: Sequence[Any], dims: Sequence[int | None]) -> int:
    """Size of the mapped axis."""
    return next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)


def at_axis(operand: Any, dim: int | None, axis: int, size: int) -> Any:
    """The operand with the mapped axis at ``axis``; one that is not mapped is repeated."""
    if dim is not None:
        return jnp.moveaxis(operand, dim, axis)
    shape = (*operand.shape[:axis], size, *operand.shape[axis:])
    return jnp.broadcast_to(jnp.expand_dims(operand, axis), shape)


#: First axis of what has steps: of each, or of all.
_STEPS = (('t',), ('once',))


def fold_positions(operation: Operation, size: int, operands: Sequence[Any],
                   dims: Sequence[int | None], request: str, params: Params) -> Any:
    """Batching of an element-wise scan: the mapped axis becomes one more axis of positions."""
    one = [jax.ShapeDtypeStruct(tuple(n for i, n in enumerate(a.shape) if i != d), a.dtype)
           for a, d in zip(operands, dims, strict=True)]
    axes = operation.axes(*one, **params)
    moved = [a if names == ('t',) else at_axis(a, d, int(names[:1] in _STEPS), size)
             for a, d, names in zip(operands, dims, axes.operands, strict=True)]
    out = bind(operation, *moved, backend=request, **params)
    return out, [int('t' in names) for names in axes.results]
