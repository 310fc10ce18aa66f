# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Suites of the operations that make inputs x outputs: the D-RTRL trace, the weight gradient."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import oracle
from tests.ops.suites.base import Suite, close, draw, in_turn
from traceops import ops


class DTraceWindowSuite(Suite):
    """``d_trace_window``."""

    gradient = 'entering'

    def operands(self, S=2, dtype=jnp.float32, T=3, B=2, I=5, O=8, storage=None):  # noqa: E741
        return [draw(1, B, I, O, S, dtype=dtype).astype(storage or dtype),
                draw(2, T, B, I, dtype=dtype), draw(3, T, B, O, S, dtype=dtype),
                draw(4, B, O, S, S, scale=.6, dtype=dtype), draw(5, B, O, S, dtype=dtype)]

    def call(self, *operands, backend=None):
        return ops.d_trace_window(*operands, gradient=self.gradient, backend=backend)

    def definition(self, *operands):
        from traceops.kernels.d_trace_window.reference import d_trace_window
        return d_trace_window(*operands, gradient=self.gradient)

    @pytest.mark.parametrize('gradient, sizes, S', in_turn(
        ['entering', 'leaving'], [(1, 1, 1), (3, 60, 63), (2, 17, 36), (4, 3, 130)],
        [1, 2, 3, 4, 5, 6, 7, 8], part=5))
    def test_matches_a_loop(self, S, sizes, gradient):
        B, I, O = sizes  # noqa: E741
        operands = self.operands(S, T=4, B=B, I=I, O=O)
        got = ops.d_trace_window(*operands, gradient=gradient, backend=self.backend)
        close(got, oracle.d_trace_window(*operands, gradient), self.tolerance)

    @pytest.mark.parametrize('gradient, T, S', in_turn(
        ['entering', 'leaving'], [12, 50], [1, 2, 3, 4, 5, 6, 7, 8], part=7))
    def test_a_window_of_many_steps(self, S, T, gradient):
        """Multiplied, all steps at once."""
        operands = self.operands(S, T=T, B=2, I=18, O=37)
        got = ops.d_trace_window(*operands, gradient=gradient, backend=self.backend)
        close(got, oracle.d_trace_window(*operands, gradient), self.tolerance)

    @pytest.mark.parametrize('S, T', [(1, 3), (2, 12), (4, 3), (3, 12)])
    @pytest.mark.parametrize('storage, tolerance', [(jnp.bfloat16, 5e-3), (jnp.float16, 6e-4)])
    def test_narrow_storage(self, S, T, storage, tolerance):
        """Stored narrow, computed in float32: the gradient is that of the stored trace."""
        operands = self.operands(S, T=T, storage=storage)
        new, total = self.run(*operands)
        assert new.dtype == storage and total.dtype == jnp.float32
        want = oracle.d_trace_window(*operands)
        close(new, want[0], tolerance)          # one rounding, at the end
        close(total, want[1], self.tolerance)

    def test_one_step_is_the_update(self):
        e, x, f, D, L = self.operands(T=1)
        got = ops.d_trace_update(e, x[0], f[0], D, L, backend=self.backend)
        close(got, oracle.d_trace_window(e, x, f, D, L, 'leaving'), self.tolerance)

    def test_no_gradient(self):
        operands = self.operands()
        new, total = ops.d_trace_window(*operands, gradient='none', backend=self.backend)
        close(new, oracle.d_trace_window(*operands)[0], self.tolerance)
        assert not np.asarray(total).any()

    def test_beside_the_old_trace(self):
        operands = self.operands(T=12)
        got = ops.d_trace_window(*operands, in_place=False, backend=self.backend)
        close(got, oracle.d_trace_window(*operands), self.tolerance)

    def test_no_step(self):
        operands = self.operands(T=0)
        close(self.run(*operands), oracle.d_trace_window(*operands, self.gradient),
              self.tolerance)

    def test_an_empty_batch(self):
        new, total = self.run(*self.operands(B=0))
        assert new.shape == (0, 5, 8, 2) and not np.asarray(total).any()

    def test_steps_make_a_window(self):
        """T steps of the update, and one window of the same steps, leave the same trace."""
        e, x, f, _, L = self.operands(T=3)
        D = draw(9, 3, 2, 8, 2, 2, scale=.6)
        eye = jnp.broadcast_to(jnp.eye(2), D.shape[1:])
        factors, P = [], eye
        for t in range(2, -1, -1):
            factors.append(jnp.einsum('bosr,bor->bos', P, f[t], precision='highest'))
            P = jnp.einsum('bosr,borq->bosq', P, D[t], precision='highest')
        window, _ = ops.d_trace_window(e, x, jnp.stack(factors[::-1]), P, L,
                                       backend=self.backend)
        for t in range(3):
            e, _ = ops.d_trace_update(e, x[t], f[t], D[t], L, backend=self.backend)
        close(window, e, 2e-6)

    def test_donation(self):
        operands = self.operands(B=2, I=16, O=32)
        want = self.run(*operands)
        got = jax.jit(self.run, donate_argnums=0)(jnp.array(operands[0]), *operands[1:])
        close(got, want, 1e-7)


class TraceGradientSuite(Suite):
    """``trace_gradient``."""

    options = {'precision': 'highest', 'by_sample': False}

    def operands(self, S=2, dtype=jnp.float32, T=3, B=4, I=5, O=7):  # noqa: E741
        samples = (B,) * self.options['by_sample']
        return [draw(1, T, B, I, dtype=dtype), draw(2, T, B, O, dtype=dtype),
                draw(3, *samples, I, O, dtype=dtype)]

    def call(self, *operands, backend=None):
        return ops.trace_gradient(*operands, **self.options, backend=backend)

    def definition(self, *operands):
        from traceops.kernels.trace_gradient.reference import trace_gradient
        return trace_gradient(*operands, **self.options)

    def expected(self, *operands):
        return oracle.trace_gradient(*operands, by_sample=self.options['by_sample'])

    @pytest.mark.parametrize('T, B, I, O', [(1, 1, 1, 1), (5, 3, 60, 63), (50, 8, 17, 100)])
    def test_matches_a_loop(self, T, B, I, O):  # noqa: E741
        operands = self.operands(T=T, B=B, I=I, O=O)
        close(self.run(*operands), self.expected(*operands), self.tolerance)
        close(self.run(*operands[:2]), self.expected(*operands[:2]), self.tolerance)

    def test_an_empty_batch(self):
        assert not np.asarray(ops.trace_gradient(
            jnp.zeros((3, 0, 5)), jnp.zeros((3, 0, 7)), backend=self.backend)).any()


class TraceGradientBySampleSuite(TraceGradientSuite):
    """The same, summed over steps alone."""

    options = {'precision': 'highest', 'by_sample': True}
    test_an_empty_batch = None

    def test_samples_one_by_one(self):
        """As large as a CPU takes them one after the other."""
        operands = self.operands(T=4, B=3, I=130, O=140)[:2]
        close(self.run(*operands), self.expected(*operands), self.tolerance)

    @pytest.mark.parametrize('S, T', [(1, 4), (2, 4), (3, 1)])
    def test_a_trace_that_starts_from_zero(self, S, T):
        x, factor = draw(1, T, 3, 5), draw(2, T, 3, 7, S)
        want = oracle.d_trace_window(jnp.zeros((3, 5, 7, S)), x, factor,
                                     jnp.zeros((3, 7, S, S)), jnp.zeros((3, 7, S)))[0]
        close(ops.d_trace_start(x, factor, backend=self.backend), want, self.tolerance)


class SparseTraceGradientSuite(Suite):
    """``sparse_trace_gradient``; synapses are given, and some connect the same."""

    by_sample = False

    def operands(self, S=2, dtype=jnp.float32, T=3, B=4, I=5, O=7):  # noqa: E741
        return [draw(1, T, B, I, dtype=dtype), draw(2, T, B, O, dtype=dtype)]

    def pattern(self, x, delta, count=None):
        I, O = x.shape[-1], delta.shape[-1]  # noqa: E741
        rng = np.random.default_rng(7)
        count = I * O // 2 + 1 if count is None else count
        return (jnp.asarray(np.sort(rng.integers(0, I, count)), jnp.int32),
                jnp.asarray(rng.integers(0, O, count), jnp.int32))

    def call(self, *operands, backend=None, count=None):
        return ops.sparse_trace_gradient(*operands, *self.pattern(*operands, count),
                                         by_sample=self.by_sample, backend=backend)

    def definition(self, *operands):
        from traceops.kernels.sparse_trace_gradient.reference import sparse_trace_gradient
        return sparse_trace_gradient(*operands, *self.pattern(*operands), self.by_sample)

    def expected(self, *operands, count=None):
        sources, targets = map(np.asarray, self.pattern(*operands, count))
        return oracle.trace_gradient(*operands, by_sample=self.by_sample)[..., sources, targets]

    @pytest.mark.parametrize('T, B, I, O, count', [
        (1, 1, 1, 1, 1), (5, 3, 60, 63, None), (50, 8, 17, 100, 300), (4, 2, 90, 40, 9),
        (3, 2, 30, 45, 3000)])
    def test_matches_a_loop(self, T, B, I, O, count):  # noqa: E741
        """Of most synapses there are, of few, and of more than there are places."""
        operands = self.operands(T=T, B=B, I=I, O=O)
        close(self.call(*operands, backend=self.backend, count=count),
              self.expected(*operands, count=count), self.tolerance)

    def test_no_synapse(self):
        assert self.call(*self.operands(), backend=self.backend, count=0).shape[-1] == 0
