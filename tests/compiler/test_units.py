# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of the window engine against plain loops, over shapes (hypothesis)."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from traceops.compiler.jaxpr import (
    depends_on,
    inlined,
    is_zero,
    narrowed,
    producers,
    value_if_constant,
)
from traceops.engine.windows import choose_window
from traceops.kernels.adjoint_window.reference import adjoint_window
from traceops.kernels.es_trace_window.reference import (
    es_trace_step,
    instant_gradient,
    output_filter,
)

SHAPES = dict(T=st.integers(1, 6), n=st.integers(1, 3), S=st.integers(1, 4),
              kappa=st.sampled_from([None, 0.5]), seed=st.integers(0, 99))


def draw(T, n, S, seed):
    rng = np.random.RandomState(seed)
    return rng.randn(T, n, S), rng.rand(T, n, S, S), rng.randn(T, n, S), rng.randn(n, S)


def split(a):
    return tuple(jnp.asarray(a[..., i]) for i in range(a.shape[-1]))


def rows(D):
    return tuple(split(D[..., i, :]) for i in range(D.shape[-1]))


@settings(max_examples=15, deadline=None)
@given(**SHAPES)
def test_adjoint_equals_the_trace(T, n, S, kappa, seed):
    """sum_t L_t . e_t with the trace e rolled forward, for one input that is always 1."""
    L, D, f, e0 = draw(T, n, S, seed)
    want, e, filt = 0., e0, e0.copy()
    for t in range(T):
        e = np.einsum('nij,nj->ni', D[t], e) + f[t]
        filt = (kappa or 0.) * filt + e
        want = want + L[t] * filt
    deltas, entering, filtered = adjoint_window(split(L), rows(D), [split(f)], kappa)
    got = sum(deltas[0]) + sum(a * b for a, b in zip(entering, split(e0), strict=True))
    if kappa is not None:
        got = got + sum(a * b for a, b in zip(filtered, split(e0), strict=True))
    np.testing.assert_allclose(got, want.sum(-1), rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(**SHAPES)
def test_unit_signals_give_the_trace_that_leaves(T, n, S, kappa, seed):
    _, D, f, e0 = draw(T, n, S, seed)
    e, filt = e0, 0.
    for t in range(T):
        e = np.einsum('nij,nj->ni', D[t], e) + f[t]
        filt = e if kappa is None else kappa * filt + e
    unit = np.zeros((T, n, S))
    for i in range(S):      # what is owed to state i at the end is what its adjoint finds
        unit[-1] = np.eye(S)[i]
        (p,), M, _ = adjoint_window(split(unit), rows(D), [split(f)], kappa)
        got = p.sum(0) + sum(M[j] * e0[:, j] for j in range(S))
        np.testing.assert_allclose(got, filt[:, i], rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(T=SHAPES['T'], n=SHAPES['n'], S=SHAPES['S'], seed=SHAPES['seed'],
       decay=st.sampled_from([0., 0.5, 0.9]))
def test_factorised_step_and_filter(T, n, S, seed, decay):
    L, D, f, g = draw(T, n, S, seed)
    x = np.random.RandomState(seed + 1).randn(T, n)
    a, want, carry, instants = 0., 0., split(g), []
    for t in range(T):
        g = decay * np.einsum('nij,nj->ni', D[t], g) + (1 - decay) * f[t]
        a = decay * a + x[t]
        want = want + a * (g * L[t]).sum(-1) / 0.7
        carry = es_trace_step(rows(D[t]), split(f[t]), carry, decay)
        instants.append(instant_gradient(split(L[t]), carry, 0.7))
    got = (output_filter(jnp.stack(instants), decay) * x).sum(0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jnp.stack(carry, -1), g, rtol=1e-4, atol=1e-4)


@given(length=st.integers(1, 500), size=st.integers(1, 1000), budget=st.integers(1, 10 ** 5))
def test_a_chosen_window_fits(length, size, budget):
    K = choose_window(length, size, None, budget)
    assert 1 <= K <= length and (K == 1 or K * size <= budget)
    assert K == length if length * size <= budget else True


def test_a_product_of_which_a_part_is_read_is_the_product_of_that_part():
    def fn(a, W, V):
        now, _ = jnp.split(a @ W, [4], axis=1)                      # split, one half read
        first = jnp.einsum('bi,bij->bj', a, V)[1:, :2]              # a slice, with a batch axis
        whole = a @ (W + 1.)                                        # read whole: left alone
        return now, first, whole

    shapes = (3, 5), (5, 9), (3, 5, 7)
    args = [np.random.RandomState(i).randn(*shape) for i, shape in enumerate(shapes)]
    closed = inlined(jax.make_jaxpr(fn)(*args))
    products = [e.outvars[0].aval.shape for e in narrowed(closed).jaxpr.eqns
                if e.primitive.name == 'dot_general']
    assert sorted(products) == [(2, 2), (3, 4), (3, 9)]
    for want, got in zip(fn(*args), jax.core.eval_jaxpr(
            narrowed(closed).jaxpr, narrowed(closed).consts, *args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_what_is_inlined_is_computed_once_and_of_one_value_as_a_scalar():
    table = np.arange(3.)

    def fn(a, key):
        decay = jnp.exp(-jnp.full((4, 3), 0.1) / jnp.full((4, 3), 2.))[:, :, None].reshape(4, 3)
        again = jax.jit(jnp.sin)(a * decay) + jnp.sin(jax.lax.stop_gradient(a) * decay)
        other = jnp.sin(a * 0.2) + jax.random.normal(key, a.shape)
        looped = [jax.lax.scan(lambda c, x: (c + x, c * x), 0., t)[1] for t in (table, 2 * table)]
        return again, other, *looped, jnp.zeros((2,)) + 1.

    args = np.random.RandomState(0).randn(4, 3).astype('f'), jax.random.key(0)
    flat = inlined(jax.make_jaxpr(fn)(*args))
    names = [e.primitive.name for e in flat.jaxpr.eqns]
    assert names.count('sin') == 2 and names.count('scan') == 2
    assert [e.outvars[0].aval.shape for e in flat.jaxpr.eqns if e.primitive.name == 'exp'] == [()]
    for want, got in zip(fn(*args), jax.core.eval_jaxpr(flat.jaxpr, flat.consts, *args),
                         strict=True):
        assert want.shape == got.shape and want.dtype == got.dtype
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_number_that_enters_a_call_has_its_type(float64):
    def fn(a, b):
        scale = jax.jit(lambda v, c: v * jnp.full(v.shape, c))
        return scale(a, jnp.float32(0.1)), scale(b, 0.1)

    args = np.ones(3, 'f'), np.ones(3)
    flat = inlined(jax.make_jaxpr(fn)(*args))
    for want, got in zip(fn(*args), jax.core.eval_jaxpr(flat.jaxpr, flat.consts, *args),
                         strict=True):
        assert want.dtype == got.dtype
        np.testing.assert_array_equal(got, want)


def test_questions_asked_of_a_jaxpr():
    def fn(a, b):
        return jnp.zeros((2,)), jax.jit(lambda v: v + 1)(a), a * b, jnp.where(a > 0, a, 0.)
    closed = jax.make_jaxpr(fn)(1., 2.)
    made_by = producers(closed.jaxpr)
    assert [is_zero(made_by, v) for v in closed.jaxpr.outvars] == [True, False, False, False]
    assert [depends_on(closed, i, (1,)) for i in range(4)] == [False, False, True, False]
    assert value_if_constant(closed, 1, {0: 3.}) == 4.
    assert value_if_constant(closed, 2, {0: 3.}) is None
    flat = inlined(closed)
    assert 'jit' in str(closed) and 'jit' not in str(flat)
    assert jax.core.eval_jaxpr(flat.jaxpr, flat.consts, 1., 2.)[1:] == [2., 2., 1.]
