# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Analyses and rewrites of jaxprs: slicing, inlining, dependence, constant values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

__all__ = ['CALLBACKS', 'CALLS', 'alone', 'backward_slice', 'changes_nothing', 'depends_on',
           'effects_of', 'elementwise', 'extended', 'inlined', 'interpreted', 'is_pure', 'is_zero',
           'named', 'narrowed', 'part', 'producers', 'reached', 'value_if_constant', 'with_inputs']

#: Calls of a program within a program, and the parameter that holds it.
CALLS = {'jit': 'jaxpr', 'pjit': 'jaxpr', 'closed_call': 'call_jaxpr',
         'custom_jvp_call': 'call_jaxpr', 'custom_vjp_call': 'call_jaxpr'}

#: Effects that another loop over the same steps has as well, if it has each of them once a step.
CALLBACKS = frozenset('debug_callback debug_print io_callback'.split())


def part(closed: ClosedJaxpr, invars: Sequence[Any], outvars: Sequence[Any],
         eqns: Sequence[Any]) -> Callable[..., list[Any]]:
    """Some equations of a program as a function from ``invars`` to ``outvars``."""
    jaxpr = _rebuilt(closed.jaxpr, invars, outvars, eqns)

    def run(*inputs: Any) -> list[Any]:
        out = jax.core.eval_jaxpr(jaxpr, closed.consts, *inputs)
        return [jnp.asarray(a, v.aval.dtype) if isinstance(v, Literal) else a
                for v, a in zip(outvars, out, strict=True)]
    return run


def inlined(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without nested calls (for one that is not differentiated any more).

    Arrays that broadcast one value are computed as scalars, and common subexpressions once.
    """
    known: dict[Any, Any] = {}
    return jax.make_jaxpr(lambda *inputs: list(map(
        _array, _without_calls(closed.jaxpr, closed.consts, inputs, known))))(
        *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars))


def _without_calls(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any],
                   known: dict[Any, Any]) -> list[Any]:
    def instead(eqn: Any, read: Callable[[Any], Any]) -> list[Any] | None:
        operands = list(map(read, eqn.invars))
        inner = eqn.params.get(CALLS.get(eqn.primitive.name, ''))
        if inner is not None:
            return _without_calls(inner.jaxpr, inner.consts, operands, known)
        if (changes_nothing(eqn) or eqn.primitive.name == 'stop_gradient') and not isinstance(
                eqn.invars[0], Literal):
            return operands
        question = _question(eqn, operands)
        if question not in known:
            results = _full(eqn, operands)
            known[question] = alone(jaxpr, eqn, read) if results is None else results, operands
        return known[question][0]

    return interpreted(jaxpr, consts, inputs, jaxpr.eqns, instead)


def _question(eqn: Any, operands: Sequence[Any]) -> Any:
    """The key of an equation for common-subexpression elimination."""
    given = tuple(named(v) if isinstance(v, Literal) else id(a)
                  for v, a in zip(eqn.invars, operands, strict=True))
    params = tuple(eqn.params.items())
    try:
        hash(params)
    except TypeError:
        params = (object(),)            # an array, or what holds one
    return eqn.primitive, params, given, None if is_pure(eqn) else object()


def named(literal: Literal) -> Any:
    """The key of a literal: its value in its dtype."""
    return np.asarray(literal.val, literal.aval.dtype).tobytes(), literal.aval.dtype


def alone(jaxpr: Jaxpr, eqn: Any, read: Callable[[Any], Any]) -> list[Any]:
    """Evaluate one equation."""
    operands = list({v: None for v in eqn.invars if not isinstance(v, Literal)})
    return jax.core.eval_jaxpr(_rebuilt(jaxpr, operands, eqn.outvars, [eqn], ()), (),
                               *(_array(read(v)) for v in operands))


def interpreted(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], eqns: Iterable[Any],
                 instead: Callable[..., Sequence[Any] | None]) -> list[Any]:
    """Evaluate equations; ``instead(eqn, read)`` gives the results of those that it replaces."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

    def read(var: Any) -> Any:
        return np.asarray(var.val, var.aval.dtype) if isinstance(var, Literal) else env[var]

    for eqn in eqns:
        results = instead(eqn, read)
        if results is None:
            results = alone(jaxpr, eqn, read)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


#: Elementwise primitives, which act on a scalar in the same way.
_ELEMENTWISE = frozenset('''
    abs add add_any convert_element_type copy cos div exp exp2 expm1 exprel integer_pow log log1p
    logistic max min mul neg pow rsqrt sin sqrt square sub tanh'''.split())
_RESHAPES = frozenset('broadcast_in_dim expand_dims reshape squeeze stack reduce_sum'.split())


@dataclasses.dataclass(frozen=True)
class _Full:
    """A broadcast scalar."""

    value: Any
    shape: tuple[int, ...]


def _array(value: Any) -> Any:
    return jax.lax.broadcast(value.value, value.shape) if isinstance(value, _Full) else value


def _full(eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """The result, if it is a broadcast scalar because all operands are."""
    given = [a.value if isinstance(a, _Full) else a
             for a, v in zip(operands, eqn.invars, strict=True)
             if isinstance(a, _Full) or isinstance(v, Literal)]
    if not given or len(given) < len(operands) or len(eqn.outvars) != 1:
        return None
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if name == 'broadcast_in_dim' or (
            name in _RESHAPES and len(given) == 1 and out.size == eqn.invars[0].aval.size):
        return [_Full(given[0], out.shape)]
    if name in _ELEMENTWISE and out.shape:
        return [_Full(eqn.primitive.bind(*given, **eqn.params), out.shape)]
    return None


def narrowed(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program, in which a product that is only read in part is computed in part.

    The derivative of ``concatenate([input, spikes]) @ W`` is one: a learning rule cuts the way
    back through the spikes.
    """
    jaxpr = closed.jaxpr
    live, _ = backward_slice(jaxpr, jaxpr.outvars, effects=True)
    parts = _parts_read(jaxpr, live)
    if not parts:
        return closed
    of = {v: (product, bounds) for product, found in parts for v, bounds in found.items()}
    products = {product.outvars[0] for product, _ in parts}

    def part_of(eqn: Any, read: Callable[[Any], Any]) -> list[Any] | None:
        if products.intersection(eqn.outvars):
            return [None]               # its readers are replaced too
        if not any(v in of for v in eqn.outvars):
            return None
        return [_product_of_part(of[v][0], of[v][1], *map(read, of[v][0].invars))
                if v in of else None for v in eqn.outvars]

    return jax.make_jaxpr(lambda *inputs: interpreted(
        jaxpr, closed.consts, inputs, live, part_of))(
        *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars))


def _parts_read(jaxpr: Jaxpr, live: Sequence[Any]) -> list[tuple[Any, dict[Any, Any]]]:
    """Products that are only read in part, each with the variables sliced from it and bounds."""
    readers: dict[Any, list[Any]] = {}
    for eqn in live:
        for v in eqn.invars:
            if not isinstance(v, Literal):
                readers.setdefault(v, []).append(eqn)
    wanted = {*readers, *(v for v in jaxpr.outvars if not isinstance(v, Literal))}
    out = []
    for eqn in live:
        if eqn.primitive.name != 'dot_general' or eqn.outvars[0] in jaxpr.outvars:
            continue
        product = eqn.outvars[0]
        cuts = [_bounds(reading) for reading in readers.get(product, ())]
        if None in cuts:
            continue
        found = {v: bounds for cut in cuts for v, bounds in (cut or {}).items() if v in wanted}
        if sum(v.aval.size for v in found) < product.aval.size:
            out.append((eqn, found))
    return out


def _bounds(eqn: Any) -> dict[Any, list[tuple[int, int]]] | None:
    """Where each result of a slice or split lies in its operand."""
    whole = [(0, n) for n in eqn.invars[0].aval.shape]
    if eqn.primitive.name == 'slice' and eqn.params['strides'] is None:
        return {eqn.outvars[0]: list(zip(eqn.params['start_indices'],
                                         eqn.params['limit_indices'], strict=True))}
    if eqn.primitive.name != 'split':
        return None
    axis, stops = eqn.params['axis'], np.cumsum(eqn.params['sizes']).tolist()
    return {v: [*whole[:axis], (start, stop), *whole[axis + 1:]]
            for v, start, stop in zip(eqn.outvars, [0, *stops], stops, strict=False)}


def _product_of_part(eqn: Any, bounds: list[tuple[int, int]], left: Any, right: Any) -> Any:
    """``dot_general(left, right)`` within ``bounds``, from slices of the operands."""
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params['dimension_numbers']
    free_l = [d for d in range(left.ndim) if d not in (*contract_l, *batch_l)]
    free_r = [d for d in range(right.ndim) if d not in (*contract_r, *batch_r)]
    shared, rest = bounds[:len(batch_l)], bounds[len(batch_l):]
    for d, (start, stop) in zip((*batch_l, *free_l), (*shared, *rest), strict=False):
        left = jax.lax.slice_in_dim(left, start, stop, axis=d)
    for d, (start, stop) in zip((*batch_r, *free_r), (*shared, *rest[len(free_l):]), strict=True):
        right = jax.lax.slice_in_dim(right, start, stop, axis=d)
    return eqn.primitive.bind(left, right, **eqn.params)


def backward_slice(jaxpr: Jaxpr, outvars: Iterable[Any],
                   given: Set[Any] = frozenset(),
                   effects: bool = False) -> tuple[list[Any], set[Any]]:
    """The equations that ``outvars`` need, in order, and every variable they read.

    Equations whose results are ``given`` are not among them; with ``effects``, those that do
    something besides computing are.
    """
    needed = {v for v in outvars if not isinstance(v, Literal)}
    residuals = []
    for eqn in reversed(jaxpr.eqns):
        if (effects and eqn.effects) or any(v in needed and v not in given for v in eqn.outvars):
            residuals.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
    return residuals[::-1], needed


def _rebuilt(jaxpr: Jaxpr, invars: Sequence[Any], outvars: Sequence[Any], eqns: Sequence[Any],
             constvars: Sequence[Any] | None = None) -> Jaxpr:
    debug = jaxpr.debug_info.with_unknown_names()       # other inputs and outputs
    return Jaxpr(jaxpr.constvars if constvars is None else constvars, list(invars),
                 list(outvars), list(eqns), jaxpr.effects, debug)


def extended(closed: ClosedJaxpr, more: Sequence[Any], reads: Sequence[Any],
             function: Callable[..., list[Any]]) -> ClosedJaxpr:
    """The program with more outputs: the variables ``more``, then ``function(*reads)``."""
    jaxpr = closed.jaxpr
    added = jax.make_jaxpr(function)(
        *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in reads))
    names = dict(zip(added.jaxpr.invars, reads, strict=True))

    def ours(variables: Iterable[Any]) -> list[Any]:
        return [v if isinstance(v, Literal) else names.get(v, v) for v in variables]

    eqns = [e.replace(invars=ours(e.invars)) for e in added.jaxpr.eqns]
    return ClosedJaxpr(
        _rebuilt(jaxpr, jaxpr.invars, [*jaxpr.outvars, *more, *ours(added.jaxpr.outvars)],
                 [*jaxpr.eqns, *eqns], [*jaxpr.constvars, *added.jaxpr.constvars]),
        [*closed.consts, *added.consts])


def with_inputs(closed: ClosedJaxpr, more: Sequence[Any], eqns: Sequence[Any]) -> ClosedJaxpr:
    """The program of ``eqns`` alone, with more inputs: the variables ``more``."""
    jaxpr = closed.jaxpr
    return ClosedJaxpr(
        _rebuilt(jaxpr, [*jaxpr.invars, *more], jaxpr.outvars, eqns), closed.consts)


def changes_nothing(eqn: Any) -> bool:
    """Whether an equation only strips the weak type of a value, or reshapes it to its own shape.

    Of arrays on a mesh jax keeps such a reshape.
    """
    if eqn.primitive.name not in ('convert_element_type', 'reshape'):
        return False
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    return bool(before.dtype == after.dtype and before.shape == after.shape)


def reached(eqns: Iterable[Any], sources: Iterable[Any]) -> set[Any]:
    """``sources``, and all variables that equations, in order, compute from them."""
    found = set(sources)
    for eqn in eqns:
        if any(v in found for v in eqn.invars if not isinstance(v, Literal)):
            found.update(eqn.outvars)
    return found


def effects_of(eqn: Any) -> list[str]:
    """The operations, in an equation or one itself, that do something besides computing."""
    if all(type(e).__name__ == 'NamedAxisEffect' for e in eqn.effects):     # a collective
        return []
    inside = [name for e in _inside(eqn) for name in effects_of(e)]
    return list(dict.fromkeys(inside)) or [eqn.primitive.name]


def is_pure(eqn: Any) -> bool:
    """Whether an equation may be computed again, or of many steps at once.

    A ``pure_callback`` may, says jax; but people draw numbers in it, and it may not know ``vmap``.
    """
    return not effects_of(eqn) and eqn.primitive.name not in ('pure_callback', 'rng_uniform') \
        and all(map(is_pure, _inside(eqn)))


def _inside(eqn: Any) -> list[Any]:
    return [e for jaxpr in jaxprs_in_params(eqn.params) for e in jaxpr.eqns]


def depends_on(closed: ClosedJaxpr, output: int, invars: Sequence[int]) -> bool:
    """Whether an output reads any of the inputs at these positions."""
    out = closed.jaxpr.outvars[output]
    if isinstance(out, Literal):
        return False
    _, needed = backward_slice(closed.jaxpr, [out])
    return any(closed.jaxpr.invars[i] in needed for i in invars)


def elementwise(closed: ClosedJaxpr, output: int, invar: int) -> bool:
    """Whether each element of an output reads one input only at its own place.

    ``False`` also where that cannot be told from the primitives. Calls inside the program are
    not looked into: see :func:`inlined`.
    """
    jaxpr = closed.jaxpr
    source, out = jaxpr.invars[invar], jaxpr.outvars[output]
    eqns, needed = backward_slice(jaxpr, [out])
    if source not in needed:
        return True
    found = reached(eqns, [source])
    return all(v.aval.shape == source.aval.shape for v in found if v in needed) and all(
        eqn.primitive.name in _ELEMENTWISE or eqn.primitive.name == 'select_n'
        for eqn in eqns if not found.isdisjoint(eqn.outvars))


def producers(jaxpr: Jaxpr) -> dict[Any, Any]:
    """The equation that each variable comes from."""
    return {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}


def is_zero(made_by: Mapping[Any, Any], var: Any) -> bool:
    """Whether a value is zero by construction (a symbolic zero that was instantiated).

    ``made_by``: the program's :func:`producers`.
    """
    while not isinstance(var, Literal):
        eqn = made_by.get(var)
        if eqn is None or eqn.primitive.name not in ('broadcast_in_dim', 'convert_element_type'):
            return False
        var = eqn.invars[0]
    return bool(np.all(np.asarray(var.val) == 0))


def value_if_constant(closed: ClosedJaxpr, output: int, known: dict[int, Any]) -> Any:
    """The value of an output when the inputs in ``known`` alone determine it, else ``None``.

    Parameters
    ----------
    closed : ClosedJaxpr
        The program.
    output : int
        Position of the output asked for.
    known : dict of int to array
        Values of some inputs, by position.

    Returns
    -------
    array or None
    """
    jaxpr = closed.jaxpr
    out = jaxpr.outvars[output]
    if isinstance(out, Literal):
        return out.val
    eqns, needed = backward_slice(jaxpr, [out])
    if any(v in needed for i, v in enumerate(jaxpr.invars) if i not in known):
        return None
    consts = {v: c for v, c in zip(jaxpr.constvars, closed.consts, strict=True) if v in needed}
    if any(isinstance(c, jax.core.Tracer) for c in consts.values()):
        return None
    read = [i for i, v in enumerate(jaxpr.invars) if v in needed]
    invars, values = [jaxpr.invars[i] for i in read], [known[i] for i in read]
    question = (str(_rebuilt(jaxpr, invars, [out], eqns, list(consts))),
                *(np.asarray(a).tobytes() for a in (*values, *consts.values())))
    if question not in _ANSWERS:
        with jax.ensure_compile_time_eval():    # one program, not one an equation
            _ANSWERS[question] = jax.jit(part(closed, invars, [out], eqns))(*values)[0]
    return _ANSWERS[question]


#: Results of :func:`value_if_constant`: the same few equations come up at every trace.
_ANSWERS: dict[tuple[Any, ...], Any] = {}
