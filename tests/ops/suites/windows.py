# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Suites of the operations that walk the steps of a window."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import oracle
from tests.ops.suites.base import SHAPES, Suite, close, draw, in_turn, parts, rows
from traceops import ops


class AdjointWindowSuite(Suite):
    """``adjoint_window``."""

    kappa = None

    def operands(self, S=2, dtype=jnp.float32, T=4, place=(2, 9), R=2):
        return [draw(1, T, *place, S, dtype=dtype), draw(2, T, *place, S, S, scale=.6, dtype=dtype),
                *(draw(3 + r, T, *place, S, dtype=dtype) for r in range(R))]

    def call(self, signal, jacobian, *factors, backend=None):
        return ops.adjoint_window(signal, jacobian, factors, kappa=self.kappa, backend=backend)

    def definition(self, signal, jacobian, *factors):
        from traceops.ops.adjoint_window import _reference
        return _reference(signal, jacobian, *factors, kappa=self.kappa, states=0, leaving='')

    @pytest.mark.parametrize('place, S', in_turn(SHAPES, [1, 2, 3, 4], part=3))
    def test_matches_a_loop(self, S, place):
        operands = self.operands(S, place=place, T=6, R=1)
        close(self.run(*operands),
              oracle.adjoint_window(operands[0], operands[1], operands[2:]), self.tolerance)

    @pytest.mark.parametrize('S, R', [(1, 1), (2, 3), (3, 4), (4, 2)])
    def test_kappa_and_relations(self, S, R):
        operands = self.operands(S, R=R, T=11)
        got = ops.adjoint_window(operands[0], operands[1], operands[2:], kappa=0.7,
                                 backend=self.backend)
        close(got, oracle.adjoint_window(operands[0], operands[1], operands[2:], 0.7),
              self.tolerance)

    @pytest.mark.parametrize('place', [(), (7,), (2, 3, 5)])
    def test_any_axes_of_positions(self, place):
        operands = self.operands(place=place)
        close(self.run(*operands),
              oracle.adjoint_window(operands[0], operands[1], operands[2:]), self.tolerance)

    def test_one_step_and_no_step(self):
        one = self.operands(T=1)
        close(self.run(*one), oracle.adjoint_window(one[0], one[1], one[2:]), self.tolerance)
        (delta, _), entering = self.run(*self.operands(T=0))
        assert delta.shape == (0, 2, 9) and not np.asarray(entering).any()

    def test_an_empty_batch(self):
        (delta, _), entering = self.run(*self.operands(place=(0, 9)))
        assert delta.shape == (4, 0, 9) and entering.shape == (0, 9, 2)

    @pytest.mark.parametrize('counts, kappa', in_turn([(1, 2), (2, 1), (2, 2), (2, 3), (2, 4),
                                                      (3, 1), (3, 2), (4, 1)], [None, 0.7]))
    def test_states_may_be_separate(self, counts, kappa):
        S, R = counts
        signal, jacobian, *factors = self.operands(S, R=R, place=(2, 37))
        got = ops.adjoint_window(parts(signal), rows(jacobian), [parts(f) for f in factors],
                                 kappa=kappa, backend=self.backend)
        close(got, oracle.adjoint_window(signal, jacobian, factors, kappa), self.tolerance)

    def test_separate_states_under_vmap(self):
        signal, jacobian, factor = (jnp.stack([a, -a, 2 * a]) for a in self.operands(R=1))
        got = jax.vmap(lambda L, D, f: ops.adjoint_window(
            L, D, [f], kappa=self.kappa, backend=self.backend))(
                parts(signal), rows(jacobian), parts(factor))
        one = [self.run(signal[k], jacobian[k], factor[k]) for k in range(3)]
        close(got, jax.tree.map(lambda *a: jnp.stack(a), *one), 2e-6)

    @pytest.mark.parametrize('lanes', [False, True])
    @pytest.mark.parametrize('leaving', [False, True])
    def test_what_is_the_same_at_every_step_may_come_once(self, leaving, lanes):
        """Entries of the Jacobian, one whole factor and an entry of another as ``[1, ...]``."""
        signal, jacobian, some, all_ = self.operands()
        jacobian = jacobian.at[..., 1, :].set(jacobian[:1, ..., 1, :])
        jacobian = jacobian.at[..., 0, 0].set(jacobian[:1, ..., 0, 0]) if leaving else jacobian
        some, all_ = some.at[..., 1].set(some[:1, ..., 1]), all_.at[:].set(all_[:1])

        def run(signal, jacobian, some, all_, once):
            one = (lambda a: a[:1]) if once else (lambda a: a)
            first, second = (parts(jacobian[..., i, :]) for i in range(2))
            factors = [(parts(some)[0], one(parts(some)[1])), tuple(map(one, parts(all_)))]
            D = [(one(first[0]) if leaving else first[0], first[1]), tuple(map(one, second))]
            if leaving:
                return ops.leaving_window(D, factors, backend=self.backend)
            return ops.adjoint_window(parts(signal), D, factors, backend=self.backend)
        if lanes:
            run = jax.vmap(run, in_axes=(1, 1, 1, 1, None), out_axes=0)
        operands = signal, jacobian, some, all_
        close(run(*operands, True), run(*operands, False), 1e-6)

    def test_one_state_may_come_once(self):
        signal, jacobian, factor = self.operands(S=1, R=1)
        factor = factor.at[:].set(factor[:1])

        def run(factor):
            D, f = rows(jacobian), [parts(factor)]
            return (ops.adjoint_window(parts(signal), D, f, backend=self.backend),
                    ops.leaving_window(D, f, start=True, backend=self.backend))
        close(run(factor[:1]), run(factor), 1e-7)


class LeavingWindowSuite(Suite):
    """``adjoint_window`` in its other form: what a leaving trace is made of."""

    kappa = None

    def operands(self, S=2, dtype=jnp.float32, T=4, place=(2, 9), R=2):
        return [draw(2, T, *place, S, S, scale=.6, dtype=dtype),
                *(draw(3 + r, T, *place, S, dtype=dtype) for r in range(R))]

    def call(self, jacobian, *factors, backend=None):
        return ops.leaving_window(jacobian, factors, kappa=self.kappa, backend=backend)

    def definition(self, jacobian, *factors):
        from traceops.kernels.adjoint_window.reference import leaving_window
        return leaving_window(jacobian, factors, self.kappa)

    @pytest.mark.parametrize('S, R, kappa, place', [    # filter and place in turn
        pytest.param(S, R, [None, 0.7][i % 2], [(3, 60), (1, 1), (7,)][i % 3],
                     marks=[] if i % 4 in (0, 3) else pytest.mark.slow)
        for i, (S, R) in enumerate([(1, 1), (1, 1), (1, 4), (2, 1), (2, 2), (2, 2), (2, 3), (2, 4),
                                    (3, 1), (3, 4), (4, 1), (4, 2), (4, 2)])])
    def test_matches_a_loop(self, S, R, kappa, place):
        jacobian, *factors = self.operands(S, R=R, place=place, T=6)
        want = oracle.leaving_window(jacobian, factors, kappa)
        got = ops.leaving_window(jacobian, factors, kappa=kappa, backend=self.backend)
        close(got, want, self.tolerance)
        separate = ops.leaving_window(rows(jacobian), [parts(f) for f in factors], kappa=kappa,
                                   backend=self.backend)
        close(separate, want, self.tolerance)
        start = ops.leaving_window(rows(jacobian), [parts(f) for f in factors], kappa=kappa,
                                   start=True, backend=self.backend)
        close(start[:2], want[:2], self.tolerance)
        assert start[2] is None

    def test_more_steps_than_a_kernel_loads_ahead(self):
        jacobian, *factors = self.operands(1, R=1, T=11)
        close(self.run(jacobian, *factors), oracle.leaving_window(jacobian, factors),
              self.tolerance)

    def test_one_step_and_an_empty_batch(self):
        jacobian, *factors = self.operands(T=1)
        close(self.run(jacobian, *factors), oracle.leaving_window(jacobian, factors),
              self.tolerance)
        (product, _), _, transition = self.run(*self.operands(place=(0, 9)))
        assert product.shape == (4, 0, 9, 2) and transition.shape == (0, 9, 2, 2)

    def test_a_trace_made_of_it(self):
        """With the operation that takes it: as step after step."""
        D, f = self.operands(R=1, place=(2, 8))
        x, e = draw(5, 4, 2, 5), draw(6, 2, 5, 8, 2)
        (p,), _, M = self.run(D, f)
        zero = jnp.zeros((2, 8, 2))
        got, _ = ops.d_trace_window(e, x, p, M, zero, gradient='none', backend=self.backend)
        for t in range(4):
            e = oracle.d_trace_window(e, x[t:t + 1], f[t:t + 1], D[t], zero)[0]
        close(got, e, 2e-6)


class EsTraceWindowSuite(Suite):
    """``es_trace_window``."""

    decays = {'decay_x': 0.9, 'decay_f': 0.8}

    def operands(self, S=2, dtype=jnp.float32, T=4, place=(2, 9)):
        return [draw(1, T, *place, S, dtype=dtype), draw(2, T, *place, S, S, scale=.6, dtype=dtype),
                draw(3, T, *place, S, dtype=dtype), draw(4, *place, S, dtype=dtype),
                jnp.linspace(0.4, 1., T, dtype=dtype)]

    def call(self, *operands, backend=None):
        return ops.es_trace_window(*operands[:4], correction=operands[4], **self.decays,
                                   backend=backend)

    def definition(self, *operands):
        from traceops.ops.es_trace_window import _reference
        return _reference(*operands, **self.decays, states=0)

    def expected(self, operands, **decays):
        return oracle.es_trace_window(*operands[:4], **(decays or self.decays),
                                      correction=operands[4])

    @pytest.mark.parametrize('place, S', in_turn(SHAPES, [1, 2, 3, 4], part=3))
    def test_matches_a_loop(self, S, place):
        operands = self.operands(S, place=place, T=6)
        close(self.run(*operands), self.expected(operands), self.tolerance)

    @pytest.mark.parametrize('S', [1, 2])
    def test_more_steps_than_a_kernel_loads_ahead(self, S):
        operands = self.operands(S, T=11)
        close(self.run(*operands), self.expected(operands), self.tolerance)

    @pytest.mark.parametrize('decays', [(0., 0.), (0., 0.9), (0.9, 0.)])
    def test_no_filter(self, decays):
        operands = self.operands()
        named = dict(zip(('decay_x', 'decay_f'), decays, strict=True))
        got = ops.es_trace_window(*operands[:4], correction=operands[4], **named,
                                  backend=self.backend)
        close(got, self.expected(operands, **named), self.tolerance)

    def test_one_step_is_the_update(self):
        L, D, f, g, c = self.operands(T=1)
        x, a = draw(7, 2, 5), draw(8, 2, 5)
        delta, new, inputs = ops.es_trace_update(
            L[0], D[0], f[0], g, decay_f=.8, decay_x=.9, correction=c[0], inputs=x,
            input_carry=a, backend=self.backend)
        want = self.expected([L, D, f, g, c])
        close((delta, new), (want[1], want[2]), self.tolerance)
        close(inputs, 0.9 * np.asarray(a, float) + np.asarray(x, float), self.tolerance)
        close(ops.es_trace_update(L[0], D[0], f[0], g, decay_f=.8, correction=c[0],
                                  backend=self.backend), (want[1], want[2]), self.tolerance)

    @pytest.mark.parametrize('S', [1, 2, 3, 4])
    @pytest.mark.parametrize('T', [1, 4])
    def test_states_may_be_separate(self, S, T):
        L, D, f, g, c = self.operands(S, T=T)
        separate = (parts(L), rows(D), parts(f), parts(g), c)
        close(self.run(*separate), self.expected([L, D, f, g, c]), self.tolerance)

    @pytest.mark.parametrize('lanes', [False, True])
    @pytest.mark.parametrize('S', [1, 2])
    def test_what_is_the_same_at_every_step_may_come_once(self, S, lanes):
        L, D, f, g, c = self.operands(S)
        L, D, f = (a.at[..., -1].set(a[:1, ..., -1]) for a in (L, D, f))

        def run(L, D, f, g, once):
            cut = lambda states: (*states[:-1], states[-1][:1]) if once else states  # noqa: E731
            return self.call(cut(parts(L)), [cut(row) for row in rows(D)],
                             cut(parts(f)), parts(g), c, backend=self.backend)
        if lanes:
            run = jax.vmap(run, in_axes=(1, 1, 1, 0, None))
        close(run(L, D, f, g, True), run(L, D, f, g, False), 1e-6)

    def test_no_step(self):
        operands = self.operands(T=0)
        filtered, total, carry = self.run(*operands)
        assert filtered.shape == (0, 2, 9) and not np.asarray(total).any()
        close(carry, operands[3], 1e-7)

    def test_an_empty_batch(self):
        filtered, total, carry = self.run(*self.operands(place=(0, 9)))
        assert (filtered.shape, total.shape, carry.shape) == ((4, 0, 9), (0, 9), (0, 9, 2))
