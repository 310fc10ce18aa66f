# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``adjoint_window``: the reference against loops, and as a JAX primitive."""

import jax.numpy as jnp
import pytest

from tests.ops import oracle
from tests.ops.suites import AdjointWindowSuite, LeavingWindowSuite, close
from traceops import ops


class TestAdjointWindow(AdjointWindowSuite):
    """The reference."""


class TestLeavingWindow(LeavingWindowSuite):
    """Its other form."""


@pytest.mark.usefixtures('float64')
def test_double_precision():
    suite = AdjointWindowSuite()
    operands = suite.operands(dtype=jnp.float64)
    got = suite.run(*operands)
    close(got, oracle.adjoint_window(operands[0], operands[1], operands[2:]), 1e-14)


class TestFiltered(AdjointWindowSuite):
    """The same with the filter of e-prop."""

    kappa = 0.6

    def test_matches_a_loop(self):
        operands = self.operands()
        close(self.run(*operands), oracle.adjoint_window(
            operands[0], operands[1], operands[2:], 0.6), self.tolerance)

    test_any_axes_of_positions = test_one_step_and_no_step = test_an_empty_batch = None
    test_states_may_be_separate = test_kappa_and_relations = None


@pytest.mark.parametrize('change, message', [
    (dict(signal=(4, 2, 9)), r'`jacobian` has shape .* which has 5 axes'),
    (dict(jacobian=(4, 2, 8, 2, 2)), r'`jacobian` has shape .*p1 is 9 in `signal`'),
    (dict(jacobian=(4, 2, 9, 2, 3)), r'`jacobian` has shape .* both of states, differ'),
    (dict(factor=(3, 2, 9, 2)), r'`factors\[0\]` has shape .*t is 4 in `signal`'),
    (dict(factor=(4, 2, 9, 3)), r'`factors\[0\]` has shape .*s is 2 in `signal`'),
])
def test_a_wrong_shape_names_the_argument(change, message):
    shapes = {'signal': (4, 2, 9, 2), 'jacobian': (4, 2, 9, 2, 2), 'factor': (4, 2, 9, 2)}
    signal, jacobian, factor = (jnp.zeros(s) for s in {**shapes, **change}.values())
    with pytest.raises(ValueError, match=message):
        ops.adjoint_window(signal, jacobian, [factor])


@pytest.mark.parametrize('position, name', [(0, 'signal'), (1, 'jacobian'), (2, r'factors\[0\]')])
def test_a_wrong_dtype_names_the_argument(position, name):
    operands = AdjointWindowSuite().operands(R=1)
    operands[position] = operands[position].astype(jnp.int32)
    with pytest.raises(TypeError, match=f'`{name}` is int32; it takes a real floating dtype'):
        ops.adjoint_window(operands[0], operands[1], operands[2:])
    operands[position] = operands[position].astype(jnp.float16)
    with pytest.raises(TypeError, match='all operands have one dtype'):
        ops.adjoint_window(operands[0], operands[1], operands[2:])
