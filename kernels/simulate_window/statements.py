# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The statements of a step, in the loop over steps of a Triton kernel."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

from jax.extend.core import Literal

from traceops.compiler.jaxpr import producers
from traceops.kernels.launch import power_of_2
from traceops.kernels.simulate_window.anatomy import Anatomy, Level, Product
from traceops.kernels.simulate_window.expressions import (
    SAME,
    SHAPES,
    SUMS,
    Value,
    as_operands,
    expression,
    is_number,
    left_out,
    number,
)
from traceops.kernels.simulate_window.step import UnsupportedError

__all__ = ['Exchange', 'Writer', 'block', 'everywhere', 'form', 'list_size', 'written']

#: Threads of a warp, and neurons that a kernel at least computes on.
_WARP = 32
#: Expressions longer than this are given a name.
_LONG = 60
#: Rows that a list has room for beside its neurons: they are read ahead and not looked at.
_MOST_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Values of ``width`` neurons that products read.

    Attributes
    ----------
    width : int
    events : bool
        A list of those that are not zero is written, and their rows are added; else all rows.
    scaled : bool
        Values are written too: they may be other than 0 and 1.
    products : int
        That read them.
    columns : int
        Of the weights, all products together.
    widest : int
        Of one product.
    """

    width: int
    events: bool
    scaled: bool
    products: int = 0
    columns: int = 0
    widest: int = 0


def list_size(width: int) -> int:
    """Words of a list: numbers of neurons, then room to read ahead, then how many."""
    return -(-(width + 2 * _MOST_ROWS + 1) // 16) * 16


class Writer:
    """Statements of the loop over steps, and what they read.

    ``once``: numbers of the expressions that are read once, which need no name.
    """

    def __init__(self, made_of: Anatomy, once: Set[int]) -> None:
        self.of = made_of
        self.step = made_of.step
        self.once = once
        self.given = 0
        self.made_by = producers(self.step.closed.jaxpr)
        self.lines: list[str] = []
        self.values: dict[Any, Value] = {}
        self.streams: list[Any] = []
        self.weights: list[Product] = []
        self.vectors: list[Any] = []
        self.exchanges: list[Exchange] = []
        self.exchanged: dict[Any, int] = {}
        self.widths: set[int] = set()
        self.names: Counter[str] = Counter()
        self.numbered: dict[str, int] = {}
        self.after: list[str] = []
        self.kept: list[tuple[Any, str]] = []
        sent = [p.operand for product in made_of.products.values() for p in product.parts]
        self.kinds = {v: 'spikes' if made_of.has_spikes(v) else 'sent' for v in sent}

    # -- names -----------------------------------------------------------------------------------

    def named(self, kind: str) -> str:
        """The next name of a kind."""
        self.names[kind] += 1
        return f'{kind}{self.names[kind] - 1}'

    def width(self, n: int) -> int:
        """Note that values have so many neurons."""
        self.widths.add(n)
        return n

    def read(self, var: Any) -> Value:
        """A value, as an expression."""
        if isinstance(var, Literal):
            return Value(number(var.val))
        if var not in self.values:
            level = self.of.level[var]
            if level is Level.STEP:
                raise UnsupportedError(f'{var} is read before it is made')
            of_level = self._constant if level is Level.CONSTANT else self._stream
            self.values[var] = of_level(var)
        return self.values[var]

    def _constant(self, var: Any) -> Value:
        value = self.of.numbers.get(var)
        if value is not None and value.size and (value == value.flat[0]).all():
            return Value(number(value.flat[0]))
        source = self._source(var)
        if source not in self.vectors:
            self.vectors.append(source)
        return self._told(f'c{self.vectors.index(source)}', source)

    def _stream(self, var: Any) -> Value:
        source = self._source(var)
        if source not in self.streams:
            self.streams.append(source)
        return self._told(f'x{self.streams.index(source)}', source)

    def _source(self, var: Any) -> Any:
        """What a value repeats over samples and neurons, if it does."""
        while True:
            eqn = self.made_by.get(var)
            if eqn is None or isinstance(eqn.invars[0], Literal):
                return var
            inner = eqn.invars[0]
            if eqn.primitive.name in SAME:
                var = eqn.invars[eqn.outvars.index(var)]
            elif eqn.primitive.name in SHAPES and _repeats(eqn, self.of.samples):
                var = inner
            else:
                return var

    def _told(self, name: str, var: Any) -> Value:
        if var.aval.dtype == bool:
            name = f'({name} != 0)'
        elif var.aval.dtype.name not in ('float32', 'int32'):
            raise UnsupportedError(f'the kernel computes in float32, it reads '
                                   f'{var.aval.str_short()}')
        by_sample, n = form(var, self.of.samples)
        return Value(name, self.width(n) if n else 0)

    # -- statements ------------------------------------------------------------------------------

    def give(self, var: Any, text: str, n: int) -> None:
        """The value of a variable: as it stands where it is read once, else by a name."""
        self.given += 1
        plain = text.isidentifier() or is_number(text)
        if not plain and (self.given not in self.once or len(text) > _LONG):
            name = self.named(self.kinds.get(var, 'v'))
            self.lines.append(f'{name} = {text}')
            self.numbered[name] = self.given
            text = name
        self.values[var] = Value(text, n)

    def equation(self, eqn: Any) -> None:
        """Write one equation."""
        name, out = eqn.primitive.name, eqn.outvars[0]
        if name in SAME:
            for v, o in zip(eqn.invars, eqn.outvars, strict=True):
                if o not in self.of.joined:
                    self.values[o] = self.read(v)
            return
        operands = [self.read(v) for v in eqn.invars]
        n = max(a.n for a in operands)
        if name in SHAPES:
            self.values[out] = operands[0]
            return
        if name in SUMS:
            function, of_nothing = SUMS[name]
            m = eqn.invars[0].aval.shape[-1]
            summed = f'{function}(tl.where(n{m} < {m}, {operands[0].text}, {of_nothing}), axis=0)'
            self.give(out, summed if operands[0].n else operands[0].text, 0)
            return
        result = left_out(name, operands)
        if result is not None:
            self.values[out] = result
            return
        text = expression(eqn, as_operands(name, operands))
        if text is None:
            raise UnsupportedError(f'{name} of '
                                   f'{", ".join(v.aval.str_short() for v in eqn.invars)}')
        self.give(out, text, n)

    def product(self, group: Sequence[Product]) -> None:
        """Products that read the same values: exchanged once, and their rows read together."""
        fresh = [v for v in _operands(group[0]) if v not in self.exchanged]
        for v in fresh:
            self._exchange(v)
        if fresh:
            self.lines.append('tl.debug_barrier()')
        sums: list[list[str]] = [[] for _ in group]
        for i, part in enumerate(group[0].parts):
            names = [self.named('sum') for _ in group]
            self._walk(part.operand, [(p, p.parts[i].row) for p in group], names)
            for of_product, name in zip(sums, names, strict=True):
                of_product.append(name)
        for product, terms in zip(group, sums, strict=True):
            if product.ahead:
                self.streams.append(product)
                terms.insert(0, f'x{len(self.streams) - 1}')
            self.give(product.result, ' + '.join(terms), product.width)

    def _exchange(self, var: Any) -> None:
        k, n = len(self.exchanges), self.width(var.aval.shape[-1])
        self.exchanged[var] = k
        given = Exchange(n, self.of.has_spikes(var), not self.of.is_binary(var))
        if not given.events:
            given = dataclasses.replace(given, scaled=True)
        self.exchanges.append(given)
        value, size = self.read(var), list_size(n)
        text = value.text if value.n else everywhere(value, n)
        if given.events:
            self.lines.append(f'list_events(events{k}, {text}, n{n}, sample, t, {n}, {size})')
        if given.scaled:
            self.lines.append(f'list_values(values{k}, {text}, n{n}, sample, t, {n}, {size})')

    def _walk(self, operand: Any, given: Sequence[tuple[Product, int]],
              names: Sequence[str]) -> None:
        k = self.exchanged[operand]
        exchange, columns = self.exchanges[k], self.width(given[0][0].width)
        pointers = [f'w{self._weight(p)}' + (f' + {row * columns}' if row else '')
                    for p, row in given]
        of_rows = f'{columns}, {block(columns)}, {list_size(exchange.width)}, ROWS{k}'
        count = len(given)
        if exchange.events:
            values = f'values{k}' if exchange.scaled else 'None'
            call = (f'sum_events(({", ".join(pointers)},), events{k}, {values}, sample, t, '
                    f'{of_rows}, {exchange.scaled}, {count})')
        else:
            call = (f'sum_rows(({", ".join(pointers)},), values{k}, all{k}, sample, t, '
                    f'{of_rows}, {count})')
        self.lines.append(f'{", ".join(names)}{"," * (count == 1)} = {call}')
        self.exchanges[k] = dataclasses.replace(
            exchange, products=exchange.products + count,
            columns=exchange.columns + count * columns,
            widest=max(exchange.widest, count * columns))

    def _weight(self, product: Product) -> int:
        for i, other in enumerate(self.weights):
            if other.weights is product.weights and other.transposed == product.transposed:
                return i
        self.weights.append(product)
        return len(self.weights) - 1


def block(n: int) -> int:
    """Neurons that a kernel computes on for n."""
    return max(power_of_2(n), _WARP)


def form(var: Any, samples: tuple[int, ...]) -> tuple[bool, int]:
    """Whether a value that is read has every sample, and how many neurons: 0 for a number."""
    shape, k = var.aval.shape, len(samples)
    if shape == samples:
        return bool(k), 0
    if k and shape == (*samples, 1):
        return True, 1
    if shape[:k] == samples and len(shape) == k + 1:
        return bool(k), shape[-1]
    if len(shape) <= k + 1 and all(m == 1 for m in shape[:-1]):
        return False, shape[-1] if shape and shape[-1] > 1 else 0
    raise UnsupportedError(f'it reads a value of shape {shape}, where states have {samples} '
                           'samples')


def _repeats(eqn: Any, samples: tuple[int, ...]) -> bool:
    """Whether the result of a change of shape has one value of its operand in each place."""
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if before.size == 1:
        return True
    if eqn.primitive.name == 'broadcast_in_dim':
        dims = tuple(eqn.params['broadcast_dimensions'])
        trailing = tuple(range(after.ndim - before.ndim, after.ndim))
        return dims == trailing and all(
            b in (1, a) for b, a in zip(before.shape, after.shape[after.ndim - before.ndim:],
                                        strict=True)) and (
            before.shape[-1] == after.shape[-1] and before.size == before.shape[-1])
    return before.shape[-1:] == after.shape[-1:] == (before.size,)


def _operands(product: Product) -> list[Any]:
    return [p.operand for p in product.parts]


def written(made_of: Anatomy, once: Set[int]) -> Writer:
    """All statements of a step."""
    w = Writer(made_of, once)
    for i, var in enumerate(made_of.step.states):
        w.values[var] = Value(f's{i}', w.width(var.aval.shape[-1]))
    written: set[Any] = set()
    for eqn in made_of.body:
        product = made_of.products.get(eqn.outvars[0])
        if product is None:
            w.equation(eqn)
        elif product.result not in written:
            group = [p for p in made_of.products.values()
                     if p.result not in written and p.width == product.width
                     and _operands(p) == _operands(product)]
            written.update(p.result for p in group)
            w.product(group)
    w.after = [_whole(w, v) for v in made_of.step.after]
    w.kept = [(v, _whole(w, v)) for v in made_of.step.kept if made_of.level_of(v) is Level.STEP]
    return w


def everywhere(value: Value, n: int) -> str:
    """A number for each neuron."""
    return f'{value.operand(1)} + tl.zeros(({block(n)},), tl.float32)'


def _whole(w: Writer, var: Any) -> str:
    """A value that leaves the step, with all its neurons."""
    value, n = w.read(var), var.aval.shape[-1] if var.aval.ndim > len(w.of.samples) else 0
    if n and not value.n:
        return everywhere(value, w.width(n))
    return value.text
