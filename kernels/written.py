# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels that a program writes: how a text becomes a function, and entry points.

Triton passes pointers one by one, and a kernel that serves any number of states wants them in
tuples. So each number has an entry point of its own, a call with the names in their places.
"""

import linecache

__all__ = ['entry_point', 'function_of']


def function_of(text, name, space):
    """The function ``name`` that ``text`` defines, where ``space`` are its globals."""
    file = f'<traceops {space["__name__"]}.{name}>'
    # where inspect.getsource looks for it, which Triton asks
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    exec(compile(text, file, 'exec'), space)
    return space[name]


def entry_point(space, name, body, operands, outputs, constants, **known):
    """A kernel ``name(operands, T, outputs, constants)`` that calls ``body`` with its operands and
    outputs in tuples.

    Parameters
    ----------
    space : dict
        The globals of the module that has ``body``; gets the kernel.
    operands, outputs : sequence
        Names of pointers, and tuples of names, nested as ``body`` takes them.
    constants : sequence of str
        Parameters known when the kernel is compiled; ``body`` has parameters of these names.
    **known
        Other parameters of ``body``, which this entry point decides.
    """
    parameters = [*_names(operands), 'T', *_names(outputs),
                  *(f'{c}: tl.constexpr' for c in constants)]
    given = [*map(_tuple, (*operands, *outputs)), 'T', *(f'{c}={c}' for c in constants),
             *(f'{k}={v}' for k, v in known.items())]
    return function_of(f'@triton.jit\ndef {name}({", ".join(parameters)}):\n'
                       f'    {body}({", ".join(given)})\n', name, space)


def _names(nested):
    for item in nested:
        if isinstance(item, str):
            yield item
        else:
            yield from _names(item)


def _tuple(item):
    return item if isinstance(item, str) else f'({" ".join(_tuple(i) + "," for i in item)})'
