# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Launch of `simulate_window`: rows at a time, warps; what is left to the loop of XLA."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.compiler.jaxpr import backward_slice, part
from traceops.kernels.launch import KernelCall, Tile, generation, power_of_2
from traceops.kernels.simulate_window.anatomy import Anatomy, Level, Product, anatomy, resized
from traceops.kernels.simulate_window.statements import Exchange, block, list_size
from traceops.kernels.simulate_window.step import Step, UnsupportedError
from traceops.kernels.simulate_window.text import Text, name_of, write

__all__ = ['EVENTS', 'IN_CACHE', 'MOST', 'described', 'kernel_of', 'kind_of', 'measured_as', 'name',
           'plan']

#: Neurons up to which a list of events is the automatic choice: above, the weights are no longer
#: in the cache of all devices. And up to which a sample is a program.
EVENTS, MOST = 4096, 8192
#: Bytes of all weights, by generation, up to which reading all rows at every step is: they stay in
#: the first cache of a multiprocessor.
IN_CACHE = {80: 150 * 2 ** 10, 90: 256 * 2 ** 10, 100: 256 * 2 ** 10}
#: Sums that a thread holds, of a list of events and of all rows; warps of a program at most.
_SUMS, _SUMS_OF_ALL, _WARPS = 32, 16, 16
#: Neurons a warp is given: 128-bit accesses.
_A_WARP = 128


@functools.lru_cache(maxsize=64)
def _kernel(step: Step) -> tuple[Anatomy, Text] | str:
    try:
        made_of = anatomy(step)
        text = write(made_of)
        if text.widest > MOST:
            return f'a program has {MOST} neurons at most, the step {text.widest}'
        return made_of, text
    except UnsupportedError as reason:
        return str(reason)


def kernel_of(step: Step) -> tuple[Anatomy, Text]:
    """The step's parts, and its text.

    Raises
    ------
    UnsupportedError
        There is no kernel of this step; the message says what is in the way.
    """
    found = _kernel(step)
    if isinstance(found, str):
        raise UnsupportedError(found)
    return found


def name(step: Step) -> str:
    """Of the step's kernel."""
    return name_of(kernel_of(step)[1].source)


def described(step: Step) -> str:
    """What the kernel does at each step, for who asks."""
    _, text = kernel_of(step)
    said = [f'{kind} of {count} product{"s" * (count > 1)}' for kind, count in (
        ('events', sum(e.products for e in text.exchanges if e.events)),
        ('all rows', sum(e.products for e in text.exchanges if not e.events))) if count]
    rows = sorted({rows_of(e, warps_of(text)) for e in text.exchanges})
    at_a_time = f', {" or ".join(map(str, rows))} rows at a time' if rows else ''
    return (' and '.join(said) or 'no product') + at_a_time


def warps_of(text: Text) -> int:
    """Of a program: four neurons a thread, more for all rows, which are read side by side."""
    warps = min(max(block(text.widest) // _A_WARP, 1), _WARPS)
    return warps if all(e.events for e in text.exchanges) else min(max(8, warps), _WARPS)


def rows_of(exchange: Exchange, warps: int) -> int:
    """Rows of the weights that are read at a time."""
    sums = _SUMS if exchange.events else _SUMS_OF_ALL
    together = sums * 32 * warps // block(exchange.widest)
    return max(1, min(power_of_2(together + 1) // 2, 8 if exchange.events else 32))


def plan(*operands: Any, step: Step, capability: int) -> KernelCall | str:
    """The launch for operands of these shapes, or why there is none."""
    try:
        here = step.split(operands)[2][0].shape[:-1]
        step = resized(step, here)              # a device may have a part of the samples
        made_of, text = kernel_of(step)
        step = made_of.step                     # equal, and perhaps of other variables
    except UnsupportedError as reason:
        return str(reason)
    constants, slices, states = step.split(operands)
    T, samples, warps = slices[0].shape[0], math.prod(made_of.samples), warps_of(text)
    lists = [((samples, 2, list_size(e.width)), kind) for kind in (np.int32, np.float32)
             for e in text.exchanges if (e.events if kind is np.int32 else e.scaled)]
    kept = [v for v in step.kept if made_of.level_of(v) is Level.STEP]
    outputs = [*(((T, *v.aval.shape), np.float32) for v in kept),
               *((a.shape, np.float32) for a in states), *lists]
    return KernelCall(
        kernel=f'simulate_window.{name_of(text.source)}', outputs=tuple(outputs),
        grid=(samples,),
        scalars=(T, samples, *(e.width for e in text.exchanges if not e.events)),
        constants={f'ROWS{k}': rows_of(e, warps) for k, e in enumerate(text.exchanges)},
        tile=Tile((), warps=warps, stages=1, blocks_per_sm=1),
        prepare=functools.partial(_prepared, made_of, text),
        finish=functools.partial(_finished, made_of, len(kept)),
        rather=_rather(text, generation(capability)))


def measured_as(*operands: Any, step: Step) -> list[str]:
    """Under what such a call is measured: this text for so many samples, or layers of its size.

    Samples, and of layers neurons, are rounded up to a power of two.
    """
    made_of, text = kernel_of(step)
    samples = power_of_2(math.prod(made_of.samples))
    return [f'{name_of(text.source)}, {samples} samples',
            f'{kind_of(text)}, {power_of_2(text.widest)} neurons, {samples} samples']


def kind_of(text: Text) -> str:
    """What kind of layer, of those that are measured for all sizes."""
    if not text.exchanges:
        return 'no product'
    return 'events' if all(e.events for e in text.exchanges) else 'all rows'


def _rather(text: Text, generation: int) -> str:
    if text.widest > EVENTS:
        return (f'{text.widest} neurons: their weights leave the cache, and the kernel was tried '
                f"for up to {EVENTS}; backend='triton' asks for it")
    size = 4 * sum(e.width * e.columns for e in text.exchanges if not e.events)
    if size > IN_CACHE[generation]:
        return (f'weights of {size / 2 ** 10:.0f} KiB that are read whole at every step do not '
                f"stay in a multiprocessor's cache ({IN_CACHE[generation] // 2 ** 10} KiB); "
                "backend='triton' asks for the kernel")
    return ''


def _ahead(made_of: Anatomy, constants: Sequence[Any], slices: Sequence[Any],
           wanted: Sequence[Any]) -> list[Any]:
    """Of variables or products: what is known ahead, ``[T, ...]``; of products, their part."""
    if not wanted:
        return []
    closed, step = made_of.step.closed, made_of.step
    parts = [p for w in wanted if isinstance(w, Product) for p in w.ahead]
    weights = [w.weights for w in wanted if isinstance(w, Product)]
    read = list(dict.fromkeys([*(w for w in wanted if not isinstance(w, Product)),
                               *(p.operand for p in parts), *weights]))
    given = [*step.closed.jaxpr.invars[:step.constants + step.slices]]
    eqns, _ = backward_slice(closed.jaxpr, read)
    run = part(closed, given, read, eqns)

    def one(*now: Any) -> list[Any]:
        values = dict(zip(read, run(*constants, *now), strict=True))
        return [_known(w, values) if isinstance(w, Product) else values[w] for w in wanted]
    return jax.vmap(one)(*slices)


def _known(product: Product, values: dict[Any, Any]) -> Any:
    """The sum of the terms of a product that are known ahead."""
    weights = values[product.weights].astype(product.eqn.invars[1].aval.dtype)
    axis = int(product.transposed)
    terms = [product.eqn.primitive.bind(
        values[p.operand], jax.lax.slice_in_dim(weights, p.row, p.row + p.rows, axis=axis),
        **product.eqn.params) for p in product.ahead]
    return functools.reduce(jnp.add, terms)


def _prepared(made_of: Anatomy, text: Text, operands: Sequence[Any]) -> list[Any]:
    """The kernel's operands: what is constant, and what is known ahead, of all steps."""
    step, closed = made_of.step, made_of.step.closed
    constants, slices, states = step.split(operands)
    streams = _ahead(made_of, constants, slices, text.streams)
    wanted = list(dict.fromkeys([*(p.weights for p in text.weights), *text.vectors]))
    eqns, _ = backward_slice(closed.jaxpr, wanted)
    fixed = dict(zip(wanted, part(closed, closed.jaxpr.invars[:step.constants], wanted, eqns)(
        *constants), strict=True))
    weights = [fixed[p.weights].T if p.transposed else fixed[p.weights] for p in text.weights]
    plain = [a.astype(jnp.int32) if a.dtype == bool else a
             for a in (*streams, *weights, *(fixed[v] for v in text.vectors))]
    return [*plain, *states]


def _finished(made_of: Anatomy, count: int, operands: Sequence[Any],
              outputs: Sequence[Any]) -> tuple[Any, ...]:
    """States and what is kept; of that, what was known ahead is not the kernel's."""
    step = made_of.step
    constants, slices, states = step.split(operands)
    from_kernel, after = list(outputs[:count]), outputs[count:count + len(states)]
    known = list(dict.fromkeys(v for v in step.kept if made_of.level_of(v) is not Level.STEP))
    others = dict(zip(known, _ahead(made_of, constants, slices, known), strict=True))
    rest = iter(from_kernel)
    return (*after, *(others[v] if v in others else next(rest) for v in step.kept))
