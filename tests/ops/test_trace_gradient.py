# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``trace_gradient``: the reference against loops, and as a JAX primitive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import oracle
from tests.ops.suites import (
    TraceGradientBySampleSuite,
    TraceGradientSuite,
    close,
    draw,
    spikes,
)
from traceops import ops


class TestTraceGradient(TraceGradientSuite):
    """The reference."""


class TestTraceGradientBySample(TraceGradientBySampleSuite):
    """The reference."""


@pytest.mark.usefixtures('float64')
def test_double_precision():
    suite = TraceGradientSuite()
    operands = suite.operands(dtype=jnp.float64)
    got = suite.run(*operands)
    close(got, oracle.trace_gradient(*operands), 1e-14)


#: What the docstring states: relative error by norm, spikes and Gaussian inputs.
ERRORS = {'highest': (1e-6, 1e-6), 'bf16x3': (1e-6, 4e-3), 'bf16x2': (1e-5, 4e-3),
          'tf32': (1e-3, 1e-3)}


@pytest.mark.parametrize('precision', ops.PRECISIONS)
def test_stated_errors(precision, capsys):
    """The error of each precision is what is documented, and not far below it."""
    delta = draw(1, 50, 32, 96)
    found = []
    for x, bound in zip((spikes(0, 50, 32, 64), draw(2, 50, 32, 64)), ERRORS[precision],
                        strict=True):
        got = np.asarray(ops.trace_gradient(x, delta, precision=precision), float)
        want = oracle.trace_gradient(x, delta)
        found.append(np.linalg.norm(got - want) / np.linalg.norm(want))
        assert found[-1] <= bound
    with capsys.disabled():
        print(f'{precision}: spikes {found[0]:.1e}, Gaussian {found[1]:.1e}', end=' ')


@pytest.mark.parametrize('precision', ops.PRECISIONS)
def test_a_sum_over_lanes_is_part_of_the_product(precision):
    """XLA folds it into the contraction: no [lanes, I, O] array."""
    V, T, I, O = 16, 2, 64, 96  # noqa: E741
    x, delta = spikes(0, V, T, 1, I), draw(1, V, T, 1, O)

    def gradient(x, delta):
        one = lambda a, b: ops.trace_gradient(a, b, precision=precision)  # noqa: E731
        return jax.vmap(one)(x, delta).sum(0)
    memory = jax.jit(gradient).lower(x, delta).compile().memory_analysis()
    assert memory.temp_size_in_bytes < V * I * O * 4 / 2


def test_a_wrong_option_says_what_works():
    with pytest.raises(ValueError, match="takes 'highest', 'bf16x3', 'bf16x2', 'tf32'"):
        ops.trace_gradient(*TraceGradientSuite().operands(), precision='fast')


def test_a_wrong_shape_names_the_argument():
    x, delta, total = TraceGradientSuite().operands()
    with pytest.raises(ValueError, match=r'`delta` has shape .*b is 4 in `inputs`'):
        ops.trace_gradient(x, delta[:, :2], total)


@pytest.mark.parametrize(('wide', 'narrow', 'shape'), [(64, 8, '8,64'), (24, 24, '24,24')])
def test_a_cpu_transposes_no_operand(wide, narrow, shape):
    """Rows are one axis, and the wider operand is the right factor (of equal ones, the deltas)."""
    x, d = spikes(0, 7, 4, wide), draw(1, 7, 4, narrow)
    compiled = jax.jit(lambda x, d: ops.trace_gradient(x, d, backend='jax')).lower(x, d).compile()
    lines = compiled.as_text().splitlines()
    product, = (line for line in lines if ' dot(' in line)
    assert f'= f32[{shape}]' in product
    assert 'lhs_contracting_dims={0}, rhs_contracting_dims={0}' in product
    assert not any(f'= f32[{n},28]' in line for line in lines for n in (wide, narrow))
    close(compiled(x, d), oracle.trace_gradient(x, d), 1e-6)


def test_outside_of_a_program_and_without_jit():
    """As jax's own primitives, an operation runs where functions are not compiled."""
    x, delta = draw(0, 4, 2, 3), draw(1, 4, 2, 5)
    with jax.disable_jit():
        close(ops.trace_gradient(x, delta), oracle.trace_gradient(x, delta), 1e-6)
