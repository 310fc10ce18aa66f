# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``d_trace_window``: the reference against loops, and as a JAX primitive."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import oracle
from tests.ops.suites import DTraceWindowSuite, close, draw
from traceops import ops
from traceops.benchmarks.targets import GPUS
from traceops.ops.primitive import OPERATIONS


class TestDTraceWindow(DTraceWindowSuite):
    """The reference."""


@pytest.mark.usefixtures('float64')
def test_double_precision():
    suite = DTraceWindowSuite()
    operands = suite.operands(dtype=jnp.float64)
    got = suite.run(*operands)
    close(got, oracle.d_trace_window(*operands), 1e-14)


class TestLeaving(DTraceWindowSuite):
    """The signal paired with the trace that leaves."""

    gradient = 'leaving'
    test_matches_a_loop = test_narrow_storage = test_one_step_is_the_update = None
    test_no_gradient = test_an_empty_batch = test_steps_make_a_window = None


@pytest.mark.parametrize('position, shape, message', [
    (0, (2, 5, 8), r'`trace` has shape .* it is \[B, I, O, S\]'),
    (1, (3, 2, 6), r'`inputs` has shape .*i is 5 in `trace`'),
    (2, (3, 2, 8, 3), r'`factor` has shape .*s is 2 in `trace`'),
    (3, (2, 7, 2, 2), r'`transition` has shape .*o is 8 in `trace`'),
    (4, (3, 8, 2), r'`signal` has shape .*b is 2 in `trace`'),
])
def test_a_wrong_shape_names_the_argument(position, shape, message):
    operands = DTraceWindowSuite().operands()
    operands[position] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        ops.d_trace_window(*operands)


def test_a_wrong_option_says_what_works():
    with pytest.raises(ValueError, match="takes 'entering', 'leaving' or 'none'"):
        ops.d_trace_window(*DTraceWindowSuite().operands(), gradient='both')


def test_the_sum_over_lanes_makes_no_array_of_lanes():
    """Upstream's vmap mode sums weight gradients over lanes: no [lanes, I, O] on the way."""
    V, I, O, S = 16, 64, 96, 2  # noqa: E741
    operands = [draw(0, V, 1, I, O, S), draw(1, V, 4, 1, I), draw(2, V, 4, 1, O, S),
                draw(3, V, 1, O, S, S), draw(4, V, 1, O, S)]

    def gradient(*a):
        return jax.vmap(lambda *b: ops.d_trace_window(*b)[1])(*a).sum(0)
    memory = jax.jit(gradient).lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes < V * I * O * 4 / 2
    want = sum(oracle.d_trace_window(*[a[v] for a in operands])[1] for v in range(V))
    close(gradient(*operands), want, 2e-6)


@pytest.mark.parametrize('storage, most', [(jnp.float32, 1.3), (jnp.bfloat16, 1.3)])
@pytest.mark.parametrize('S', [1, 2, 8])
def test_the_kernel_reads_and_writes_the_trace_once(S, storage, most):
    """Counted: what passes through memory for a window, beside one read and one write of it."""
    B, I, O, T = 32, 1024, 1024, 50  # noqa: E741
    trace = jax.ShapeDtypeStruct((B, I, O, S), storage)
    given = [trace, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (
        (T, B, I), (T, B, O, S), (B, O, S, S), (B, O, S)))]
    call = OPERATIONS['d_trace_window'].kernel(*given, capability=90, gradient='entering')
    assert call.aliases == {0: 0}               # in place: no copy beside it
    moved = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in given) + sum(
        math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in call.outputs)
    ideal = 2 * math.prod(trace.shape) * np.dtype(storage).itemsize
    assert ideal < moved <= most * ideal


@pytest.mark.parametrize('gpu', GPUS)
@pytest.mark.parametrize('T', [9, 33, 64])
def test_the_product_takes_no_longer_than_the_pass(gpu, T):
    """By the peak rates: up to 64 steps a float32 trace is bound by the memory alone."""
    device = GPUS[gpu]
    shapes = (32, 1024, 1024, 2), (T, 32, 1024), (T, 32, 1024, 2), (32, 1024, 2, 2), (32, 1024, 2)
    call = OPERATIONS['d_trace_window'].kernel(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        capability=10 * device.capability[0] + device.capability[1], gradient='entering')
    assert call.unit == 'tf32'
    pass_over = 2 * 4 * math.prod(shapes[0]) / device.bandwidth
    assert 0 < call.operations / device.peaks[call.unit] <= pass_over


@pytest.mark.cpu('how XLA for CPUs lays out an axis of one')
@pytest.mark.parametrize('S', [1, 2])
def test_a_trace_that_starts_from_zero_is_not_copied(S):
    """Of a large layer: a copy would be as large as the trace."""
    x, p = draw(0, 5, 4, 128), draw(1, 5, 4, 128, S)
    compiled = jax.jit(ops.d_trace_start).lower(x, p).compile()
    size = 4 * 4 * 128 * 128 * S
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * size
    close(compiled(x, p), np.einsum('tbi,tbos->bios', x, p), 1e-6)
