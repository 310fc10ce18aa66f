# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Products with loop-invariant weights, in the form that a CPU is quickest with in a loop."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from traceops.compiler import column_blocks, sparse_rows

__all__ = ['Products', 'constants_of', 'describe', 'prepared', 'takes_another_form']

#: Of prepared products, by their result: the operand that varies, and the function of it.
Products = Mapping[Any, tuple[Any, Callable[[Any], Any]]]

#: Primitive to form: each finds out whether it is for an operation, and prepares the weights.
_FORMS: dict[str, Any] = {'dot_general': column_blocks, 'csrmm': sparse_rows}


def takes_another_form(operation: Any, operands: Sequence[Any], varies: Callable[[Any], bool],
                       is_known: Callable[[Any], bool]) -> bool:
    """Whether a loop takes an equation (or node) in another form.

    ``varies``, ``is_known``: of an operand, whether it differs from step to step, and whether its
    value is known now.
    """
    form = _FORMS.get(operation.primitive.name)
    return form is not None and bool(form.takes(operation, operands, varies, is_known))


def constants_of(operation: Any, operands: Sequence[Any]) -> list[Any]:
    """The operands that are loop-invariant, of an operation that takes another form."""
    form = _FORMS[operation.primitive.name]
    return [a for i, a in enumerate(operands) if i != form.VARYING]


def prepared(products: Iterable[tuple[Any, Any, Sequence[Any]]],
             value: Callable[[Any], Any]) -> Products:
    """What to compute instead, prepared outside of the loop.

    Parameters
    ----------
    products : iterable of (result, operation, operands)
        Of operations that take another form.
    value : callable
        Operand that is loop-invariant -> its value.
    """
    found, made = {}, {}
    for result, operation, operands in products:
        form = _FORMS[operation.primitive.name]
        constants = constants_of(operation, operands)
        key: Hashable = (*map(id, constants), str(operation.params))
        if key not in made:
            made[key] = form.prepared(operation, *map(value, constants))
        found[result] = operands[form.VARYING], made[key]
    return found


def describe(operations: Iterable[Any]) -> list[str]:
    """What ``explain`` says of operations that take another form."""
    names = [operation.primitive.name for operation in operations]
    return [said for name, form in _FORMS.items() for said in form.describe(names.count(name))]
