# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a kernel makes of each value of a step.

A value is *constant* (made of constants alone), *ahead* (of slices and constants: of all steps it
can be had before the first) or of the *step*: made of the states. Of the last, products with
constant weights are what a kernel has to exchange values between neurons for; all else is
computed neuron by neuron, in registers.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal

from traceops.compiler.jaxpr import CALLS, backward_slice, inlined, part, producers
from traceops.compiler.spikes import has_spikes
from traceops.kernels.simulate_window.expressions import (
    SAME,
    SHAPES,
    SUMS,
    expression,
    number,
)
from traceops.kernels.simulate_window.step import Step, UnsupportedError

__all__ = ['Anatomy', 'Level', 'Part', 'Product', 'anatomy', 'resized']


class Level(enum.IntEnum):
    """When a value can be had."""

    CONSTANT = 0
    AHEAD = 1
    STEP = 2


@dataclasses.dataclass(frozen=True)
class Part:
    """``operand @ weights[row:row + rows]``: a term of a product."""

    operand: Any
    row: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with constant weights, ``[rows, n]``, or of which that is the transpose.

    Attributes
    ----------
    result, weights : variable
        (Weights of half the bytes as they are, where the step widens them.)
    ahead, parts : tuple of Part
        Terms of what is known ahead, and of what is made of the states.
    """

    eqn: Any
    weights: Any
    ahead: tuple[Part, ...]
    parts: tuple[Part, ...]

    @property
    def result(self) -> Any:
        return self.eqn.outvars[0]

    @property
    def width(self) -> int:
        """Columns of the weights."""
        return int(self.result.aval.shape[-1])

    @property
    def transposed(self) -> bool:
        """Whether the weights come as ``[n, rows]``."""
        return bool(self.eqn.params['dimension_numbers'][0][1] == (1,))


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """What a step is made of.

    Attributes
    ----------
    step : Step
        Without nested calls.
    samples : tuple of int
        Leading axes of every state: samples never meet in a step.
    level : dict of variable to Level
    body : tuple of equations
        Those of the step level, in order, products among them.
    products : dict of variable to Product
    joined : set of variables
        Concatenations, which only products read.
    """

    step: Step
    samples: tuple[int, ...]
    level: dict[Any, Level]
    body: tuple[Any, ...]
    products: dict[Any, Product]
    joined: frozenset[Any]

    def level_of(self, var: Any) -> Level:
        """When a value can be had."""
        return Level.CONSTANT if isinstance(var, Literal) else self.level[var]

    def has_spikes(self, var: Any) -> bool:
        """Whether a value is made of spikes, or is a state that always is."""
        jaxpr, step = self.step.closed.jaxpr, self.step
        passed = dict(zip(step.states, step.after, strict=True))
        seen: set[Any] = set()
        while var in passed and var not in seen:
            seen.add(var)
            var = passed[var]
        return has_spikes(jaxpr, var, step.spike)

    def is_binary(self, var: Any) -> bool:
        """Whether a value is 0 or 1 by construction."""
        eqn = producers(self.step.closed.jaxpr).get(var)
        return (eqn is not None and eqn.primitive.name == 'convert_element_type'
                and eqn.invars[0].aval.dtype == bool)

    @functools.cached_property
    def numbers(self) -> dict[Any, np.ndarray]:
        """Values that depend on no input, evaluated: of what the step level reads."""
        jaxpr = self.step.closed.jaxpr
        read = dict.fromkeys(v for e in self.body for v in e.invars
                             if not isinstance(v, Literal) and self.level[v] is Level.CONSTANT)
        read.update(dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, Literal)
                                  and self.level[v] is Level.CONSTANT))
        inputs = set(jaxpr.invars)
        folded = [v for v in read if not inputs & {v, *backward_slice(jaxpr, [v])[1]}]
        if not folded:
            return {}
        eqns, _ = backward_slice(jaxpr, folded)
        with jax.ensure_compile_time_eval():        # one program, not one an equation
            values = jax.jit(part(self.step.closed, [], folded, eqns))()
        return dict(zip(folded, map(np.asarray, values), strict=True))


@functools.lru_cache(maxsize=64)
def _tried(step: Step) -> Anatomy | str:
    try:
        return _anatomy(step)
    except UnsupportedError as reason:
        return str(reason)


def anatomy(step: Step) -> Anatomy:
    """What the step is made of.

    Raises
    ------
    UnsupportedError
        It cannot be a kernel; the message says what is in the way.
    """
    found = _tried(step)
    if isinstance(found, str):
        raise UnsupportedError(found)
    return found


def resized(step: Step, samples: tuple[int, ...]) -> Step:
    """The same step of another number of samples."""
    made_of = anatomy(step)
    if made_of.samples == samples:
        return step
    step = made_of.step
    old, jaxpr = made_of.samples, step.closed.jaxpr
    if any(map(is_random, jaxpr.eqns)):
        raise UnsupportedError('a device would draw the random numbers of other samples')
    weights = {p.weights for p in made_of.products.values()}

    def here(shape: Sequence[int]) -> tuple[int, ...]:
        k = len(old)
        return (*samples, *shape[k:]) if tuple(shape[:k]) == old else tuple(shape)

    def run(*inputs: Any) -> list[Any]:
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*step.closed.consts, *inputs),
                       strict=True))

        def read(v: Any) -> Any:
            return np.asarray(v.val, v.aval.dtype) if isinstance(v, Literal) else env[v]

        for eqn in jaxpr.eqns:
            params, out = dict(eqn.params), eqn.outvars[0]
            for name in ('shape', 'new_sizes', 'sharding'):
                if eqn.primitive.name in SHAPES and name in params and out not in weights:
                    params[name] = None if name == 'sharding' else here(params[name])
            result = eqn.primitive.bind(*map(read, eqn.invars), **params)
            env.update(zip(eqn.outvars, result if eqn.primitive.multiple_results else [result],
                           strict=True))
        return [read(v) for v in jaxpr.outvars]

    moving = {*jaxpr.invars[step.constants:]}
    closed = jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(
        here(v.aval.shape) if v in moving else v.aval.shape, v.aval.dtype)
        for v in jaxpr.invars))
    return dataclasses.replace(step, closed=closed)


def _anatomy(step: Step) -> Anatomy:
    if any(e.primitive.name in CALLS for e in step.closed.jaxpr.eqns):
        step = dataclasses.replace(step, closed=inlined(step.closed))
    jaxpr = step.closed.jaxpr
    _check_effects(jaxpr)
    samples = _samples(step)
    level, made_by = _levels(step), producers(jaxpr)
    _check_random(jaxpr, level)
    own = [e for e in jaxpr.eqns if any(level[v] is Level.STEP for v in e.outvars)]
    products = {e.outvars[0]: _product(e, made_by, level, samples) for e in own
                if e.primitive.name == 'dot_general'}
    joined = _joined(own)
    body = tuple(e for e in own if e.primitive.name != 'concatenate')
    for eqn in body:
        if eqn.outvars[0] not in products:
            _check(eqn, joined, level, samples)
    for var, what in [*((v, 'a state') for v in step.after),
                      *((v, 'what is kept') for v in step.kept)]:
        if not isinstance(var, Literal) and level[var] is Level.STEP:
            if var in joined:
                raise UnsupportedError('it keeps a concatenation')
            _check_value(var, what, samples)
            if var.aval.dtype != np.float32:
                raise UnsupportedError(f'the kernel computes in float32, {what} is '
                                       f'{var.aval.dtype}')
    return Anatomy(step, samples, level, body, products, frozenset(joined))


def _joined(eqns: Sequence[Any]) -> set[Any]:
    found: set[Any] = set()
    for eqn in eqns:
        if eqn.primitive.name == 'concatenate':
            found.update(eqn.outvars)
        elif eqn.primitive.name in SAME:
            found.update(o for v, o in zip(eqn.invars, eqn.outvars, strict=True)
                         if not isinstance(v, Literal) and v in found)
    return found


def _check_effects(jaxpr: Jaxpr) -> None:
    for eqn in jaxpr.eqns:
        if eqn.effects:
            raise UnsupportedError(f'the step does something besides computing '
                                   f'({eqn.primitive.name})')


def _check_random(jaxpr: Jaxpr, level: dict[Any, Level]) -> None:
    """Numbers of keys that are known ahead are drawn ahead; some generators give other numbers to
    many keys at once.
    """
    for eqn in jaxpr.eqns:
        name, when = eqn.primitive.name, level[eqn.outvars[0]]
        if when is Level.CONSTANT or not is_random(eqn):
            continue
        if when is Level.STEP:
            raise UnsupportedError(f'the step draws random numbers from its states ({name})')
        if not name.startswith('threefry') and not any(
                str(v.aval.dtype) == 'key<fry>' for v in (*eqn.invars, *eqn.outvars)):
            raise UnsupportedError(f'the step draws random numbers ({name}), by a generator that '
                                   'gives others to the keys of many steps at once')


def is_random(eqn: Any) -> bool:
    """Whether it has to do with random numbers, or the keys of them."""
    return bool(eqn.primitive.name.startswith(('random_', 'rng_', 'threefry')))


def _samples(step: Step) -> tuple[int, ...]:
    """Leading axes of the states."""
    if not step.states:
        raise UnsupportedError('no state passes from step to step')
    first = step.states[0].aval
    for var in step.states:
        shape, dtype = var.aval.shape, var.aval.dtype
        if dtype != np.float32:
            raise UnsupportedError(f'the kernel computes in float32, a state is {dtype}')
        if not shape or shape[:-1] != first.shape[:-1]:
            raise UnsupportedError(f'states of shapes {first.shape} and {shape} do not share '
                                   'their leading axes')
    return tuple(first.shape[:-1])


def _levels(step: Step) -> dict[Any, Level]:
    jaxpr, ahead = step.closed.jaxpr, step.constants + step.slices
    level = {v: Level.CONSTANT if i < step.constants else
             Level.AHEAD if i < ahead else Level.STEP for i, v in enumerate(jaxpr.invars)}
    level.update(dict.fromkeys(jaxpr.constvars, Level.CONSTANT))
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in SAME and len(eqn.invars) == len(eqn.outvars):
            given = [v if isinstance(v, Literal) else level[v] for v in eqn.invars]
            level.update((o, Level.CONSTANT if isinstance(g, Literal) else g)
                         for o, g in zip(eqn.outvars, given, strict=True))
            continue
        highest = max((level[v] for v in eqn.invars if not isinstance(v, Literal)),
                      default=Level.CONSTANT)
        level.update(dict.fromkeys(eqn.outvars, highest))
    return level


def _product(eqn: Any, made_by: dict[Any, Any], level: dict[Any, Level],
             samples: tuple[int, ...]) -> Product:
    (contract, batch), (left, right) = eqn.params['dimension_numbers'], eqn.invars
    if isinstance(right, Literal) or level[right] is not Level.CONSTANT:
        raise UnsupportedError('a product of two values that both change from step to step'
                               if isinstance(left, Literal) or level[left] is Level.STEP else
                               'a product whose weights are its first operand')
    if (any(batch) or right.aval.ndim != 2 or left.aval.shape[:-1] != samples
            or contract[0] != (left.aval.ndim - 1,)):
        raise UnsupportedError(f'a product of {left.aval.str_short()} and '
                               f'{right.aval.str_short()} over axes {contract}, {batch}')
    if left.aval.dtype != np.float32 or eqn.outvars[0].aval.dtype != np.float32:
        raise UnsupportedError(f'the kernel computes in float32, a product is of '
                               f'{left.aval.str_short()}')
    ahead: list[Part] = []
    parts: list[Part] = []
    row = 0
    for v in _pieces(left, made_by, level):
        rows = v.aval.shape[-1]
        waits = not isinstance(v, Literal) and level[v] is Level.STEP
        (parts if waits else ahead).append(Part(v, row, rows))
        row += rows
    return Product(eqn, _narrow(right, made_by), tuple(ahead), tuple(parts))


def _narrow(weights: Any, made_by: dict[Any, Any]) -> Any:
    """Weights before they are widened, which a kernel does as it reads them."""
    eqn = made_by.get(weights)
    if eqn is None or eqn.primitive.name != 'convert_element_type':
        return weights
    return eqn.invars[0] if eqn.invars[0].aval.dtype.name == 'bfloat16' else weights


def _pieces(var: Any, made_by: dict[Any, Any], level: dict[Any, Level]) -> list[Any]:
    """What an operand of a product is joined of, along its last axis."""
    eqn = None if isinstance(var, Literal) else made_by.get(var)
    if eqn is None or level[var] is not Level.STEP:
        return [var]
    if eqn.primitive.name in SAME:
        return _pieces(eqn.invars[eqn.outvars.index(var)], made_by, level)
    if eqn.primitive.name != 'concatenate' or eqn.params['dimension'] != var.aval.ndim - 1:
        return [var]
    return [p for v in eqn.invars for p in _pieces(v, made_by, level)]


def _check(eqn: Any, joined: set[Any], level: dict[Any, Level],
           samples: tuple[int, ...]) -> None:
    """An equation of the step is one that is computed neuron by neuron, or over those of a sample.
    """
    name = eqn.primitive.name
    said = f'{name} of {", ".join(v.aval.str_short() for v in eqn.invars)}'
    if joined.intersection(v for v in eqn.invars if not isinstance(v, Literal)):
        if name in SAME:
            return
        raise UnsupportedError(f'a concatenation that {name} reads, which is no product')
    if name in SUMS and tuple(eqn.params['axes']) != (len(samples),):
        raise UnsupportedError(f'{said} over samples')
    for var in eqn.outvars:
        _check_value(var, said, samples)
    if name in SAME or name in SUMS:
        return
    if name in SHAPES:
        _check_shape(eqn, said, samples)
        return
    # of constants it is known later whether they are numbers
    numbers = [number(v.val) if isinstance(v, Literal) else
               '1.0' if level[v] is Level.CONSTANT else 'x' for v in eqn.invars]
    if expression(eqn, numbers) is None:
        raise UnsupportedError(said)


def _check_shape(eqn: Any, said: str, samples: tuple[int, ...]) -> None:
    """The same neurons, or one value for all of a sample."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    k = len(samples)
    in_order = eqn.primitive.name != 'broadcast_in_dim' or tuple(
        eqn.params['broadcast_dimensions']) == tuple(range(len(before)))
    if not in_order or before[:k] != samples or (
            len(before) > k and len(after) > k and before[k] not in (1, after[k])):
        raise UnsupportedError(f'{said} to {after}')


def _check_value(var: Any, said: str, samples: tuple[int, ...]) -> None:
    shape, dtype = var.aval.shape, var.aval.dtype
    if dtype.name not in ('float32', 'int32', 'bool'):
        raise UnsupportedError(f'the kernel computes in float32, the step in {dtype} ({said})')
    if shape[:len(samples)] != samples or len(shape) > len(samples) + 1:
        raise UnsupportedError(f'a value of shape {shape} ({said}), where states have {samples} '
                               'samples')
