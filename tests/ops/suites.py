# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""One suite an operation; every backend inherits it and must pass the same.

``backend`` is what is asked for. The reference is also tried in float64; a kernel computes in
float32.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import oracle
from traceops import ops

SHAPES = [(1, 1), (3, 60), (2, 63), (5, 37), (1, 1000)]     # batch x outputs


def draw(seed, *shape, scale=1., dtype=jnp.float32):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def spikes(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.3, dtype)


def parts(array):
    """A trailing axis of states as one array a state."""
    return tuple(array[..., s] for s in range(array.shape[-1]))


def rows(array):
    return tuple(parts(array[..., i, :]) for i in range(array.shape[-2]))


def close(got, want, tolerance):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (
            np.linalg.norm(a - b) / np.linalg.norm(b))
        assert a.size == 0 or np.abs(b).max() > 0           # equal because both are nothing?


class Suite:
    """What every operation must do. A subclass names ``call``, ``operands`` and ``oracle``."""

    backend = 'jax'
    tolerance = 2e-6
    batch_axes = ()             # of each operand, where vmap may map an axis (all of them)

    def operands(self, S=2, dtype=jnp.float32):
        raise NotImplementedError

    def call(self, *operands, backend=None):
        raise NotImplementedError

    def run(self, *operands):
        return self.call(*operands, backend=self.backend)

    def test_jit_is_eager(self):
        operands = self.operands()
        close(jax.jit(self.run)(*operands), self.run(*operands), 1e-7)

    @pytest.mark.parametrize('mapped', ['all', 'each', 'all but one'])
    def test_vmap(self, mapped):
        """Every operand mapped, one alone, all but one: as one call an element."""
        lanes = 3
        many = [jnp.stack([a, 0.5 * a, -a]) for a in self.operands()]
        count = len(many)
        choices = {'all': [tuple(range(count))], 'each': [(i,) for i in range(count)],
                   'all but one': list(itertools.combinations(range(count), count - 1))}[mapped]
        for chosen in choices:
            axes = tuple(0 if i in chosen else None for i in range(count))
            operands = [a if i in chosen else a[0] for i, a in enumerate(many)]
            got = jax.vmap(self.run, in_axes=axes)(*operands)
            one = [self.run(*[a[k] if i in chosen else a for i, a in enumerate(operands)])
                   for k in range(lanes)]
            close(got, jax.tree.map(lambda *a: jnp.stack(a), *one), 2e-6)

    def test_vmap_of_inner_axes(self):
        """The mapped axis may be any axis."""
        many = [jnp.stack([a, 0.5 * a, -a], axis=-1) for a in self.operands()]
        got = jax.vmap(self.run, in_axes=-1)(*many)
        one = [self.run(*[a[..., k] for a in many]) for k in range(3)]
        close(got, jax.tree.map(lambda *a: jnp.stack(a), *one), 2e-6)

    def test_nested_vmap(self):
        many = [jnp.stack([jnp.stack([a, -a]), jnp.stack([0.5 * a, 2 * a]),
                           jnp.stack([1.5 * a, 3 * a])]) for a in self.operands()]
        got = jax.vmap(jax.vmap(self.run))(*many)
        one = [[self.run(*[a[i, j] for a in many]) for j in range(2)] for i in range(3)]
        rows = [jax.tree.map(lambda *a: jnp.stack(a), *row) for row in one]
        close(got, jax.tree.map(lambda *a: jnp.stack(a), *rows), 2e-6)

    def test_vmap_is_one_call(self):
        """No loop: whatever is mapped, once or twice, the batched program holds the primitive
        once, and no while or map.
        """
        operands = self.operands()
        for inner in list(itertools.product((None, 0), repeat=len(operands)))[1:]:
            for axes in ((inner,), (inner, (*inner[1:], inner[0]))):
                mapped, many = self.run, list(operands)
                for each in axes:
                    mapped = jax.vmap(mapped, each)
                    many = [a if d is None else jnp.stack([a, a])
                            for a, d in zip(many, each, strict=True)]
                eqns = jax.make_jaxpr(mapped)(*many).jaxpr.eqns
                names = [eqn.primitive.name for eqn in eqns]
                assert sum(name.startswith('etp_') for name in names) == 1, axes
                assert not {'scan', 'while'} & set(names), axes

    def test_control_flow_and_remat(self):
        operands = self.operands()
        want = self.run(*operands)

        def scanned(first):
            return jax.lax.scan(lambda c, _: (c, self.run(c, *operands[1:])), first, None, 2)[1]
        close(jax.tree.map(lambda a: a[1], jax.jit(scanned)(operands[0])), want, 1e-7)
        close(jax.jit(lambda flag: jax.lax.cond(
            flag, lambda: self.run(*operands),
            lambda: jax.tree.map(jnp.zeros_like, want)))(True), want, 1e-7)
        close(jax.jit(jax.checkpoint(self.run))(*operands), want, 1e-7)
        start = jax.tree.map(jnp.zeros_like, want)
        looped = jax.jit(lambda: jax.lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, self.run(*operands)), (0, start)))()
        close(looped[1], want, 1e-7)

    def test_gradient(self):
        """Through the reference, whatever the backend: as jax's own of the definition."""
        operands = self.operands()

        def loss(call):
            return lambda *a: sum((v ** 2).sum() for v in jax.tree.leaves(call(*a)))
        argnums = tuple(range(len(operands)))
        got = jax.grad(loss(self.run), argnums)(*operands)
        want = jax.grad(loss(self.definition), argnums)(*operands)
        close(got, want, 1e-5)

    def definition(self, *operands):
        """The reference, called outside of the primitive."""
        raise NotImplementedError


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

    @pytest.mark.parametrize('S', [1, 2, 3, 4])
    @pytest.mark.parametrize('place', SHAPES)
    def test_matches_a_loop(self, S, place):
        operands = self.operands(S, place=place, T=6, R=1)
        close(self.run(*operands),
              oracle.adjoint_window(operands[0], operands[1], operands[2:]), self.tolerance)

    @pytest.mark.parametrize('S, R', [(1, 1), (2, 3), (3, 4), (4, 2)])
    def test_kappa_and_relations(self, S, R):
        operands = self.operands(S, R=R, T=7)
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

    @pytest.mark.parametrize('S, R', [(1, 2), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2),
                                      (4, 1)])
    @pytest.mark.parametrize('kappa', [None, 0.7])
    def test_states_may_be_separate(self, S, R, kappa):
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

    @pytest.mark.parametrize('S, R', [(1, 1), (1, 4), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1),
                                      (3, 4), (4, 1), (4, 2)])
    @pytest.mark.parametrize('place', [(3, 60), (1, 1), (7,)])
    @pytest.mark.parametrize('kappa', [None, 0.7])
    def test_matches_a_loop(self, S, R, place, kappa):
        jacobian, *factors = self.operands(S, R=R, place=place, T=6)
        want = oracle.leaving_window(jacobian, factors, kappa)
        got = ops.leaving_window(jacobian, factors, kappa=kappa, backend=self.backend)
        close(got, want, self.tolerance)
        apart = ops.leaving_window(rows(jacobian), [parts(f) for f in factors], kappa=kappa,
                                   backend=self.backend)
        close(apart, want, self.tolerance)
        start = ops.leaving_window(rows(jacobian), [parts(f) for f in factors], kappa=kappa,
                                   start=True, backend=self.backend)
        close(start[:2], want[:2], self.tolerance)
        assert start[2] is None

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
        return _reference(*operands, **self.decays)

    def expected(self, operands, **decays):
        return oracle.es_trace_window(*operands[:4], **(decays or self.decays),
                                      correction=operands[4])

    @pytest.mark.parametrize('S', [1, 2, 3, 4])
    @pytest.mark.parametrize('place', SHAPES)
    def test_matches_a_loop(self, S, place):
        operands = self.operands(S, place=place, T=6)
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

    def test_no_step(self):
        operands = self.operands(T=0)
        filtered, total, carry = self.run(*operands)
        assert filtered.shape == (0, 2, 9) and not np.asarray(total).any()
        close(carry, operands[3], 1e-7)

    def test_an_empty_batch(self):
        filtered, total, carry = self.run(*self.operands(place=(0, 9)))
        assert (filtered.shape, total.shape, carry.shape) == ((4, 0, 9), (0, 9), (0, 9, 2))


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

    @pytest.mark.parametrize('S', [1, 2, 3, 4])
    @pytest.mark.parametrize('B, I, O', [(1, 1, 1), (3, 60, 63), (2, 17, 36), (4, 3, 130)])
    @pytest.mark.parametrize('gradient', ['entering', 'leaving'])
    def test_matches_a_loop(self, S, B, I, O, gradient):  # noqa: E741
        operands = self.operands(S, T=4, B=B, I=I, O=O)
        got = ops.d_trace_window(*operands, gradient=gradient, backend=self.backend)
        close(got, oracle.d_trace_window(*operands, gradient), self.tolerance)

    @pytest.mark.parametrize('S', [1, 2, 4])
    @pytest.mark.parametrize('storage, tolerance', [(jnp.bfloat16, 5e-3), (jnp.float16, 6e-4)])
    def test_narrow_storage(self, S, storage, tolerance):
        """Stored narrow, computed in float32: the gradient is that of the stored trace."""
        operands = self.operands(S, storage=storage)
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
