# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What the kernels of `simulate_window` are made of, and how their texts become functions.

A program walks one sample through all steps. Its states stay in registers, a few neurons a thread.
Neurons meet in products alone. There the values that are not zero are put into a list in global
memory (it stays in cache), or all of them; then rows of the weights are read several at a time,
as wide as they are, and added. Lists are used in turn, so that one barrier a step is enough: who is
a step ahead writes where nobody reads any more. Nothing is added atomically, so the order of a
sum is the same in every run.

The texts are written by ``text.py``; a kernel is found here by the name that it gives to its text.
"""

import triton
import triton.language as tl

from traceops.kernels.simulate_window.text import TEXTS
from traceops.kernels.written import function_of

_functions = {}


def __getattr__(name):
    """The kernel of a text: one function a text, as caches of kernels want it."""
    if name not in TEXTS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if name not in _functions:
        space = {'__name__': f'{__name__}.{name}'}
        _functions[name] = function_of(TEXTS[name], 'simulate_window', space)
    return _functions[name]


@triton.jit
def load_row(array, at, neuron, N: tl.constexpr):
    """Row ``at`` of ``[..., N]``."""
    return tl.load(array + tl.cast(at, tl.int64) * N + neuron, mask=neuron < N, other=0.)


@triton.jit
def store_row(array, at, neuron, value, N: tl.constexpr):
    """The same to a row."""
    tl.store(array + tl.cast(at, tl.int64) * N + neuron, value, mask=neuron < N)


@triton.jit
def list_events(events, value, neuron, sample, t, N: tl.constexpr, SIZE: tl.constexpr):
    """Numbers of the neurons whose value is not zero, in order, and last in the list how many."""
    at = events + (sample * 2 + (t & 1)) * SIZE
    live = (value != 0) & (neuron < N)
    place = tl.cumsum(live.to(tl.int32), 0)
    tl.store(at + place - 1, neuron, mask=live)
    last: tl.constexpr = neuron.shape[0] - 1
    tl.store(at + SIZE - 1 + neuron * 0, place, mask=neuron == last)


@triton.jit
def list_values(values, value, neuron, sample, t, N: tl.constexpr, SIZE: tl.constexpr):
    """The values themselves, each in its place."""
    tl.store(values + (sample * 2 + (t & 1)) * SIZE + neuron, value, mask=neuron < N)


@triton.jit
def _add_rows(sums, weights, row, there, value, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
              SCALED: tl.constexpr, COUNT: tl.constexpr):
    column = tl.arange(0, WIDTH)
    mask = there[:, None]
    if WIDTH != COLUMNS:
        mask = mask & (column < COLUMNS)[None, :]
    out = ()
    for i in tl.static_range(COUNT):
        tile = tl.load(weights[i] + row[:, None] * COLUMNS + column[None, :], mask=mask,
                       other=0.).to(tl.float32)
        if SCALED:
            tile = tile * value[:, None]
        out = out + (sums[i] + tile,)
    return out


@triton.jit
def _nothing(ROWS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((ROWS, WIDTH), tl.float32),)
    return out


@triton.jit
def _each_summed(sums, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.sum(sums[i], axis=0),)
    return out


@triton.jit
def sum_events(weights, events, values, sample, t, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
               SIZE: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
               COUNT: tl.constexpr):
    """Of COUNT weights: the sum of the rows that are in the list, times their values if SCALED.

    The numbers of the next ROWS rows are loaded before these rows are; past the end of the list
    lies what nobody looks at.
    """
    at = (sample * 2 + (t & 1)) * SIZE
    count = tl.load(events + at + SIZE - 1)
    r = tl.arange(0, ROWS)
    ahead = tl.load(events + at + r)
    sums = _nothing(ROWS, WIDTH, COUNT)
    for first in range(0, count, ROWS):
        there = first + r < count
        row = tl.where(there, ahead, 0)
        ahead = tl.load(events + at + first + ROWS + r)
        value = row
        if SCALED:
            value = tl.load(values + at + row, mask=there, other=0.)
        sums = _add_rows(sums, weights, row, there, value, COLUMNS, WIDTH, SCALED, COUNT)
    return _each_summed(sums, COUNT)


@triton.jit
def sum_rows(weights, values, count, sample, t, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
             SIZE: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """The same of all rows; ``count`` of them, known at run time only: the loop is one."""
    at = (sample * 2 + (t & 1)) * SIZE
    r = tl.arange(0, ROWS)
    sums = _nothing(ROWS, WIDTH, COUNT)
    for first in range(0, count, ROWS):
        row = first + r
        there = row < count
        value = tl.load(values + at + row, mask=there, other=0.)
        sums = _add_rows(sums, weights, row, there, value, COLUMNS, WIDTH, True, COUNT)
    return _each_summed(sums, COUNT)


@triton.jit
def tanh(x):
    """XLA's rational approximation in float32."""
    y = tl.minimum(tl.maximum(x, -7.90531110763549805), 7.90531110763549805)
    z = y * y
    p = z * -2.76076847742355e-16 + 2.00018790482477e-13
    p = z * p - 8.60467152213735e-11
    p = z * p + 5.12229709037114e-08
    p = z * p + 1.48572235717979e-05
    p = z * p + 6.37261928875436e-04
    p = z * p + 4.89352455891786e-03
    q = z * 1.19825839466702e-06 + 1.18534705686654e-04
    q = z * q + 2.26843463243900e-03
    q = z * q + 4.89352518554385e-03
    return tl.where((tl.abs(x) < 0.0004) | (x != x), x, y * p / q)


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, tanh(0.5 * x) * (tl.exp(x) + 1.), tl.exp(x) - 1.)


@triton.jit
def log1p(x):
    u = 1. + x
    d = u - 1.
    return tl.where((d == 0.) | (u == float('inf')), x + tl.where(d == 0., 0., u),
                    tl.log(u) * x / tl.where(d == 0., 1., d))


@triton.jit
def logistic(x):
    return 1. / (1. + tl.exp(-x))


@triton.jit
def cosh(x):
    return 0.5 * (tl.exp(x) + tl.exp(-x))


@triton.jit
def sinh(x):
    return tl.where(tl.abs(x) < 0.5, expm1(x) * (tl.exp(-x) + 1.) * 0.5,
                    0.5 * (tl.exp(x) - tl.exp(-x)))


@triton.jit
def sign(x):
    return tl.where(x > 0., 1., tl.where(x < 0., -1., x))


@triton.jit
def square(x):
    return x * x


@triton.jit
def rsqrt(x):
    return 1. / tl.sqrt_rn(x)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float('inf')


@triton.jit
def maximum(x, y):
    return tl.where((x != x) | (x > y), x, y)


@triton.jit
def minimum(x, y):
    return tl.where((x != x) | (x < y), x, y)


@triton.jit
def power(x, y):
    """To a power that is a number: of what is negative, to a whole one."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y + 0. * x) == y + 0. * x
    odd = tl.floor((y + 0. * x) * 0.5) * 2. != y + 0. * x
    negative = tl.where(whole, tl.where(odd, -size, size), float('nan'))
    return tl.where(y + 0. * x == 0., 1., tl.where(x < 0., negative, size))
