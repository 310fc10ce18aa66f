# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What the primitives of JAX are in Triton, element by element."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ['SAME', 'SHAPES', 'SUMS', 'Value', 'as_operands', 'expression', 'is_number', 'left_out',
           'number']

#: Between two operands.
OPERATORS = {'add': '+', 'add_any': '+', 'sub': '-', 'mul': '*', 'eq': '==', 'ne': '!=', 'lt': '<',
             'le': '<=', 'gt': '>', 'ge': '>=', 'and': '&', 'or': '|', 'xor': '^', 'div': '/'}

#: Of masks only.
_LOGIC = ('and', 'or', 'xor')

#: Calls, of ``triton.py`` where it is not Triton's own.
CALLS = {
    'abs': 'tl.abs({})', 'ceil': 'tl.ceil({})', 'clamp': 'minimum(maximum({1}, {0}), {2})',
    'cos': 'tl.cos({})', 'cosh': 'cosh({})', 'erf': 'tl.erf({})', 'exp': 'tl.exp({})',
    'exp2': 'tl.exp2({})', 'expm1': 'expm1({})', 'floor': 'tl.floor({})',
    'is_finite': 'is_finite({})', 'log': 'tl.log({})', 'log1p': 'log1p({})',
    'logistic': 'logistic({})', 'max': 'maximum({}, {})', 'min': 'minimum({}, {})',
    'rsqrt': 'rsqrt({})', 'sign': 'sign({})', 'sin': 'tl.sin({})', 'sinh': 'sinh({})',
    'sqrt': 'tl.sqrt_rn({})', 'square': 'square({})', 'tanh': 'tanh({})'}

#: The value as it is.
SAME = frozenset('copy copy_p optimization_barrier stop_gradient'.split())
#: The same values in another shape.
SHAPES = frozenset('broadcast_in_dim expand_dims reshape squeeze'.split())
#: Over the neurons of a sample; what they are of nothing.
SUMS = {'reduce_sum': ('tl.sum', '0.'), 'reduce_max': ('tl.max', "float('-inf')"),
        'reduce_min': ('tl.min', "float('inf')")}

#: Powers that are written as products.
_POWERS = 16
_TYPES = {'float32': 'tl.float32', 'int32': 'tl.int32', 'bool': 'tl.int1'}


def number(value: Any) -> str:
    """A constant, as text."""
    value = np.asarray(value)
    if value.dtype == bool:
        return str(bool(value))
    if np.issubdtype(value.dtype, np.integer):
        return str(int(value))
    single = float(np.float32(value))
    return repr(single) if np.isfinite(single) else f"float('{single}')"


def is_number(text: str) -> bool:
    """Whether it is what :func:`number` gives of a finite value."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def expression(eqn: Any, operands: Sequence[str]) -> str | None:
    """The result of an equation, element by element; ``None`` where this has no text for it.

    Divided by a number is multiplied by its reciprocal, as XLA does.
    """
    name = eqn.primitive.name
    if any(v.aval.dtype.name not in _TYPES for v in (*eqn.invars, *eqn.outvars)):
        return None
    if name in _SPECIAL:
        return _SPECIAL[name](eqn, *operands)
    if name in OPERATORS and (name not in _LOGIC or eqn.invars[0].aval.dtype == bool):
        return f'{operands[0]} {OPERATORS[name]} {operands[1]}'
    if name in CALLS and eqn.invars[0].aval.dtype == np.float32:
        return CALLS[name].format(*operands)
    return None


def _divided(eqn: Any, a: str, b: str) -> str | None:
    if eqn.outvars[0].aval.dtype != np.float32:
        return None
    if is_number(b):
        with np.errstate(divide='ignore', over='ignore'):
            return f'{a} * {number(np.float32(1) / np.float32(float(b)))}'
    return f'{a} / {b}'


def _not(eqn: Any, a: str) -> str | None:
    return f'{a} == 0' if eqn.invars[0].aval.dtype == bool else None


def _negative(eqn: Any, a: str) -> str:
    return f'-{a}'


def _converted(eqn: Any, a: str) -> str:
    before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if after.name == 'bool':
        return f'{a} != 0'
    return a if before == after else f'{a}.to({_TYPES[after.name]})'


def _selected(eqn: Any, *operands: str) -> str | None:
    if len(operands) != 3 or eqn.invars[0].aval.dtype != bool:
        return None
    return f'tl.where({operands[0]}, {operands[2]}, {operands[1]})'


def _integer_power(eqn: Any, a: str) -> str | None:
    y = eqn.params['y']
    if not 1 <= abs(y) <= _POWERS:
        return None
    product = ' * '.join([a] * abs(y))
    return product if y > 0 else f'1.0 / ({product})'


def _power(eqn: Any, a: str, b: str) -> str | None:
    return f'power({a}, {b})' if is_number(b) else None


_SPECIAL: dict[str, Callable[..., str | None]] = {
    'convert_element_type': _converted, 'div': _divided, 'integer_pow': _integer_power,
    'neg': _negative, 'not': _not, 'pow': _power, 'select_n': _selected}


#: Of operators: what binds more has a higher rank; a name, a number or a call has the highest.
_RANKS = ((' == ', 0), (' != ', 0), (' < ', 0), (' <= ', 0), (' > ', 0), (' >= ', 0), (' & ', 0),
          (' | ', 0), (' ^ ', 0), (' + ', 1), (' - ', 1), (' * ', 2), (' / ', 2))
_ATOM = 3


@dataclasses.dataclass(frozen=True)
class Value:
    """An expression, and how many neurons it has: 0 for a number."""

    text: str
    n: int = 0

    @property
    def rank(self) -> int:
        """Of the operator that is applied last."""
        outside, depth = [], 0
        for c in self.text:
            depth -= c == ')'
            outside.append(c if depth == 0 else '.')
            depth += c == '('
        shown = ''.join(outside)
        ranks = [rank for operator, rank in _RANKS if operator in shown]
        return min(ranks, default=1 if shown.startswith('-') else _ATOM)

    def operand(self, least: int) -> str:
        """As an operand of what binds so much."""
        return self.text if self.rank >= least else f'({self.text})'


def as_operands(name: str, values: Sequence[Value]) -> list[str]:
    """Texts with the parentheses that an operation needs."""
    operator = OPERATORS.get(name)
    if operator is None:
        between_commas = name in CALLS or name in ('pow', 'select_n')
        return [v.text if between_commas else v.operand(_ATOM) for v in values]
    rank = dict(_RANKS)[f' {operator} ']
    comparison = rank == 0
    return [values[0].operand(rank + comparison), values[1].operand(rank + 1)]


def left_out(name: str, operands: Sequence[Value]) -> Value | None:
    """The operand that is the result: of a product with 1, of a sum with 0."""
    if len(operands) != 2:
        return None
    a, b = operands
    if name == 'mul' and a.text == '1.0' or name in ('add', 'add_any') and a.text == '0.0':
        return b
    if name in ('mul', 'div') and b.text == '1.0' or name in (
            'add', 'add_any', 'sub') and b.text == '0.0':
        return a
    return None
