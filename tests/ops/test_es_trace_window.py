# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``es_trace_window``: the reference against loops, and as a JAX primitive."""

import jax.numpy as jnp
import pytest

from tests.ops.suites import EsTraceWindowSuite, close
from traceops import ops


class TestEsTraceWindow(EsTraceWindowSuite):
    """The reference."""


@pytest.mark.usefixtures('float64')
def test_double_precision():
    suite = EsTraceWindowSuite()
    operands = suite.operands(dtype=jnp.float64)
    got = suite.run(*operands)
    close(got, suite.expected(operands), 1e-14)


@pytest.mark.parametrize('position, shape, message', [
    (2, (4, 2, 8, 2), r'`factor` has shape .*p1 is 9 in `signal`'),
    (3, (2, 9, 3), r'`carry` has shape .*s is 2 in `signal`'),
    (4, (5,), r'`correction` has shape .*t is 4 in `signal`'),
    (4, (4, 1), r'`correction` has shape .*which has 2 axes; it is \[T\]'),
])
def test_a_wrong_shape_names_the_argument(position, shape, message):
    operands = EsTraceWindowSuite().operands()
    operands[position] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        EsTraceWindowSuite().run(*operands)


def test_an_input_without_its_carry():
    L, D, f, g, _ = EsTraceWindowSuite().operands()
    with pytest.raises(TypeError, match='`inputs` and `input_carry` go together'):
        ops.es_trace_update(L[0], D[0], f[0], g, decay_f=.9, inputs=jnp.zeros((2, 3)))
