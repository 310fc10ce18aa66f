# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A step (see ``step.py``) written as the text of a Triton kernel."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from traceops.kernels.simulate_window.anatomy import Anatomy, Product
from traceops.kernels.simulate_window.statements import Exchange, Writer, block, form, written

__all__ = ['TEXTS', 'Text', 'name_of', 'write']

#: Functions of ``triton.py`` that texts call.
HELPERS = frozenset('''
    cosh expm1 is_finite list_events list_values load_row log1p logistic maximum minimum power rsqrt
    sign sinh square store_row sum_events sum_rows tanh'''.split())

#: Lines longer than this are broken.
_COLUMNS = 100


@dataclasses.dataclass(frozen=True)
class Text:
    """A kernel, and what its operands are, in the order of its parameters.

    Attributes
    ----------
    source : str
    streams : tuple
        Variables that are known ahead, or products whose part is.
    weights : tuple of Product
        Of those, the weights.
    vectors : tuple of variables
        Constants that are no number.
    exchanges : tuple of Exchange
    widest : int
        Neurons that most values have.
    """

    source: str
    streams: tuple[Any, ...]
    weights: tuple[Product, ...]
    vectors: tuple[Any, ...]
    exchanges: tuple[Exchange, ...]
    widest: int


#: Every text by the name that its kernel is found by (in ``triton.py``).
TEXTS: dict[str, str] = {}


def name_of(source: str) -> str:
    """The name that a text is found by."""
    name = f'step_{hashlib.sha256(source.encode()).hexdigest()[:12]}'
    TEXTS.setdefault(name, source)
    return name


def write(made_of: Anatomy) -> Text:
    """The kernel of a step.

    Raises
    ------
    UnsupportedError
        There is none; the message says what is in the way.
    """
    named = written(made_of, frozenset())
    read = Counter(re.findall(r'\w+', '\n'.join(
        [*named.lines, *named.after, *(text for _, text in named.kept)])))
    once = {i for name, i in named.numbered.items() if read[name] <= 2}     # one is its own line
    return _assembled(written(made_of, once))


def _assembled(w: Writer) -> Text:
    states, samples, kept, after = w.step.states, w.of.samples, w.kept, w.after
    outputs = [*(f'kept{i}' for i in range(len(kept))), *(f'last{i}' for i in range(len(states))),
               *(f'events{k}' for k, e in enumerate(w.exchanges) if e.events),
               *(f'values{k}' for k, e in enumerate(w.exchanges) if e.scaled)]
    parameters = [
        *(f'stream{i}' for i in range(len(w.streams))), *(f'w{i}' for i in range(len(w.weights))),
        *(f'vector{i}' for i in range(len(w.vectors))), *(f'first{i}' for i in range(len(states))),
        'steps', 'samples',
        *(f'all{k}' for k, e in enumerate(w.exchanges) if not e.events), *outputs,
        *(f'ROWS{k}: tl.constexpr' for k in range(len(w.exchanges)))]
    head = [f'n{n} = tl.arange(0, {block(n)})' for n in sorted(w.widths)]
    head += [f'c{i} = {_load(f"vector{i}", v, samples, "sample", "0")}'
             for i, v in enumerate(w.vectors)]
    head += [f's{i} = load_row(first{i}, sample, n{v.aval.shape[-1]}, {v.aval.shape[-1]})'
             for i, v in enumerate(states)]
    head += [f'next{i} = {_load(f"stream{i}", v, samples, "sample", "0")}'
             for i, v in enumerate(w.streams)]
    loop = ['at = tl.cast(t, tl.int64) * samples + sample']
    if w.streams:
        loop += ['then = tl.minimum(t + 1, steps - 1)',
                 'following = tl.cast(then, tl.int64) * samples + sample']
    for i, v in enumerate(w.streams):
        ahead = _load(f'stream{i}', v, samples, 'following', 'then')
        loop += [f'x{i} = next{i}', f'next{i} = {ahead}']
    loop += w.lines
    loop += [_store(f'kept{i}', v, text, samples) for i, (v, text) in enumerate(kept)]
    new = [(f's{i}', text) for i, text in enumerate(after) if text != f's{i}']
    if new:
        loop.append(f'{", ".join(s for s, _ in new)} = {", ".join(text for _, text in new)}')
    tail = [f'store_row(last{i}, sample, n{v.aval.shape[-1]}, s{i}, {v.aval.shape[-1]})'
            for i, v in enumerate(states)]
    body = ['    sample = tl.program_id(0)', *_indented(1, head), '    for t in range(steps):',
            *_indented(2, loop), *_indented(1, tail)]
    used = sorted(set(re.findall(r'(?<![.\w])(\w+)\(', '\n'.join(body))) & HELPERS)
    source = '\n'.join([
        'import triton', 'import triton.language as tl', '',
        *_wrapped('from traceops.kernels.simulate_window.triton import (', used, ')'), '', '',
        '@triton.jit', *_wrapped('def simulate_window(', parameters, '):'), *body, ''])
    return Text(source, tuple(w.streams), tuple(w.weights), tuple(w.vectors),
                tuple(w.exchanges), max(w.widths))


def _load(name: str, what: Any, samples: tuple[int, ...], row: str, step: str) -> str:
    """Of a constant, or of a step of what is known ahead."""
    if isinstance(what, Product):
        return f'load_row({name}, {row}, n{what.width}, {what.width})'
    by_sample, n = form(what, samples)
    at = row if by_sample else step
    return f'load_row({name}, {at}, n{n}, {n})' if n else f'tl.load({name} + {at})'


def _store(name: str, var: Any, text: str, samples: tuple[int, ...]) -> str:
    if var.aval.ndim > len(samples):
        n = var.aval.shape[-1]
        return f'store_row({name}, at, n{n}, {text}, {n})'
    return f'tl.store({name} + at, {text})'


def _indented(levels: int, lines: Sequence[str]) -> list[str]:
    """Calls that are too long are broken at their commas."""
    out = []
    for line in lines:
        line = '    ' * levels + line
        call = re.match(r'(.*?\w\()(.*)\)$', line)
        if call is None or len(line) <= _COLUMNS:
            out.append(line)
        else:
            out += _wrapped(call[1], call[2].split(', '), ')')
    return out


def _wrapped(start: str, items: Sequence[str], end: str) -> list[str]:
    lines, line = [], start
    for i, item in enumerate(items):
        more = item + (', ' if i < len(items) - 1 else end)
        if len(line) + len(more.rstrip()) > _COLUMNS:
            lines.append(line.rstrip())
            line = ' ' * len(start)
        line += more
    return [*lines, line]
