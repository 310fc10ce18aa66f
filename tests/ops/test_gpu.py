# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The kernels on a GPU, where there is one: the suites of the reference."""

import inspect

import jax
import pytest

from tests.ops import suites
from traceops import ops
from traceops.ops import verify
from traceops.ops.primitive import OPERATIONS

pytestmark = pytest.mark.gpu


class TestAdjointWindow(suites.AdjointWindowSuite):
    backend = 'triton'


class TestAdjointWindowFiltered(suites.AdjointWindowSuite):
    backend, kappa = 'triton', 0.6
    test_matches_a_loop = test_any_axes_of_positions = test_one_step_and_no_step = None
    test_an_empty_batch = test_states_may_be_separate = None


class TestLeavingWindow(suites.LeavingWindowSuite):
    backend = 'triton'


class TestLeavingWindowFiltered(suites.LeavingWindowSuite):
    backend, kappa = 'triton', 0.6
    test_matches_a_loop = test_one_step_and_an_empty_batch = test_a_trace_made_of_it = None
    test_more_steps_than_a_kernel_loads_ahead = None


class TestEsTraceWindow(suites.EsTraceWindowSuite):
    backend = 'triton'


class TestDTraceWindow(suites.DTraceWindowSuite):
    backend = 'triton'


class TestTraceGradient(suites.TraceGradientSuite):
    backend = 'triton'


class TestTraceGradientBySample(suites.TraceGradientBySampleSuite):
    backend = 'triton'


class TestSparseTraceGradient(suites.SparseTraceGradientSuite):
    backend = 'triton'


class TestSimulateWindow(suites.SimulateWindowSuite):
    backend = 'triton'
    tolerance = 1e-5            # of gated nets: exp and tanh are the device's


@pytest.mark.parametrize('name', OPERATIONS)
def test_the_kernel_passes_its_check_and_is_chosen(name):
    verify.forget()
    with jax.default_matmul_precision('default'):       # as users have it
        found = ops.why(name)
    assert found.backend == 'triton' and 'checked on this device' in found.reason


@pytest.mark.parametrize('suite', [
    suites.AdjointWindowSuite, suites.EsTraceWindowSuite, suites.DTraceWindowSuite,
    suites.TraceGradientSuite, suites.SparseTraceGradientSuite], ids=lambda s: s.__name__)
def test_a_large_case_on_the_automatic_choice(suite):
    """As many positions as fill the device: the kernel and the reference agree."""
    suite = suite()
    of_positions = 'place' in inspect.signature(suite.operands).parameters
    sizes = dict(place=(32, 4096)) if of_positions else dict(B=16, I=1000, O=1023)
    operands = suite.operands(**sizes)
    suites.close(jax.jit(suite.call)(*operands),
                 suite.call(*operands, backend='jax'), 1e-5)
