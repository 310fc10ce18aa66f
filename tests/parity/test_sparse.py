# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse weights: every class of pattern, every rule, what a window stores."""

import brainevent
import braintrace
import jax.numpy as jnp
import numpy as np
import pytest
import saiunit as u

import traceops
from tests.parity.harness import (
    assert_close,
    assert_same_states,
    both,
    compiled,
    pair,
    programs,
    start,
)
from tests.parity.nets import N_IN, Hidden, N, Net, _weight

pytestmark = pytest.mark.usefixtures('float64')


def _dense():
    return np.where(np.random.RandomState(1).rand(N_IN + N, N) < 0.5, 1., 0.)


def _fixed(kind):
    rng = np.random.RandomState(2)
    rows, other = (N_IN + N, N) if kind is brainevent.FixedNumPerPre else (N, N_IN + N)
    indices = np.stack([rng.permutation(other)[:3] for _ in range(rows)]).astype(np.int32)
    return kind((jnp.ones(indices.shape), jnp.asarray(indices)), shape=(N_IN + N, N))


def _twice():
    """Two synapses that connect the same, and a source with none."""
    targets = [[0, 0, 1], [], *([i % N] for i in range(2, N_IN + N))]
    indptr = np.cumsum([0, *map(len, targets)])
    return brainevent.CSR((jnp.ones(indptr[-1]), jnp.asarray(np.concatenate(targets), jnp.int32),
                           jnp.asarray(indptr, jnp.int32)), shape=(N_IN + N, N))


PATTERNS = {
    'csr': lambda: brainevent.CSR.fromdense(jnp.asarray(_dense())),
    'csc': lambda: brainevent.CSC.fromdense(jnp.asarray(_dense())),
    'csr.T': lambda: brainevent.CSR.fromdense(jnp.asarray(_dense().T)).T,
    'tcsr': lambda: brainevent.TCSR(brainevent.CSR.fromdense(jnp.asarray(_dense()))),
    'tcsr.T': lambda: brainevent.TCSR(brainevent.CSR.fromdense(jnp.asarray(_dense().T))).T,
    'dense': lambda: brainevent.Dense(jnp.asarray(_dense())),
    'jit-scalar': lambda: brainevent.JITCScalarR((0.5, 0.5, 42), shape=(N_IN + N, N)),
    'per-pre': lambda: _fixed(brainevent.FixedNumPerPre),
    'per-post': lambda: _fixed(brainevent.FixedNumPerPost),
    'twice': _twice,
}


def net(pattern, weight_fn=None, bias=False, homogeneous=False, units=False):
    class Sparse(Hidden):
        def make(self):
            matrix = self.matrix = PATTERNS[pattern]()
            if homogeneous:
                self.matrix = brainevent.CSR((jnp.ones(1), matrix.indices, matrix.indptr),
                                             shape=matrix.shape)
            self.w = _weight(*jnp.shape(getattr(self.matrix, 'data', ())))
            if units:
                self.w.value = self.w.value * u.mS
            self.b = _weight(N) if bias else None

        def op(self, x, h):
            out = braintrace.sparse_matmul(
                jnp.concatenate([x, h], -1), self.w.value, sparse_mat=self.matrix,
                bias=self.b.value if bias else None, weight_fn=weight_fn,
                bias_fn=jnp.tanh if bias else None)
            return out / u.mS if units else out
    return Net(Sparse)


def _normalised(w):
    return w / jnp.sqrt(jnp.sum(w ** 2))


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize('pattern, rule, vmap, carry, options', [
    ('csr', 'd_rtrl', False, True, {}), ('csc', 'd_rtrl', False, True, {'bias': True}),
    _slow('csc', 'es', False, True, {}), ('csr', 'es', True, True, {'weight_fn': jnp.sin}),
    _slow('csr', 'd_rtrl', True, True, {'weight_fn': jnp.sin, 'bias': True}),
    _slow('csr', 'eprop', False, True, {'weight_fn': jnp.sin}),
    _slow('csr', 'd_rtrl', False, False, {}),
    ('per-pre', 'es', False, True, {}), ('per-post', 'es', False, True, {'weight_fn': jnp.sin}),
    _slow('twice', 'es', False, True, {}), ('twice', 'd_rtrl', False, True, {}),
    ('csr', 'es', False, True, {'homogeneous': True}),
    _slow('csr', 'ostl', False, True, {'bias': True}),
    _slow('csr', 'three-factor', True, True, {}),
    ('csr', 'es', False, True, {'weight_fn': _normalised}),
    ('csr', 'd_rtrl', False, True, {'weight_fn': jnp.sin, 'units': True}),
    ('dense', 'es', False, True, {}),
    *(_slow(*case) for case in (
        ('csc', 'es', True, True, {'units': True}), ('csr.T', 'd_rtrl', False, True, {}),
        ('csr', 'es', True, True, {'homogeneous': True}), ('jit-scalar', 'es', False, True, {}),
        ('per-pre', 'es', True, True, {'units': True}))),
    *(pytest.param(*case, marks=pytest.mark.skipif(
        'TCSR' not in vars(brainevent), reason='this brainevent has no TCSR')) for case in (
            ('tcsr', 'd_rtrl', False, True, {}), ('tcsr.T', 'es', True, True, {}))),
])
def test_as_upstream(pattern, rule, vmap, carry, options):
    """Two calls, the second with a trace that enters, in windows of three of seven steps."""
    one = net(pattern, **options)
    want, got = pair(one, rule, 7, vmap, window=3, carry_trace=carry)
    grad = programs(want, got)
    for _ in range(2 if carry else 1):
        a, b = both(want, got, grad)
        assert_close(a, b, 1e-10, nonzero=True)
    if carry:
        assert_same_states(want, got, 1e-10)
    assert got.inner._last_call[0] == 'window'
    said = ' '.join(str(traceops.explain(got.learner)).split())
    assert 'pass a step' not in said
    rows = pattern in ('csr', 'csc', 'csr.T', 'twice') and not options.get('homogeneous')
    assert ('1 product with sparse weights, a row of the result at a time' in said) == rows


@pytest.mark.slow
def test_one_sample():
    one = net('csc', bias=True)
    want = start(braintrace.compile, one, 'd_rtrl', 7, batched=False)
    with traceops.configured(window=3):
        got = start(traceops.compile, one, 'd_rtrl', 7, batched=False)
    a, b = both(want, got, lambda run: run.grad())
    assert_close(a, b, 1e-10, nonzero=True)
    assert got.inner._last_call[0] == 'window'


@pytest.mark.parametrize('pattern, rule', [('csr', 'd_rtrl'), ('per-pre', 'd_rtrl')])
def test_what_upstream_refuses_is_refused(pattern, rule):
    """One weight for all synapses, and weights in rows, have no D-RTRL trace upstream."""
    one = net(pattern, homogeneous=pattern == 'csr')
    for compiler in (braintrace.compile, traceops.compile):
        run = start(compiler, one, rule, 7)
        with pytest.raises((AssertionError, ValueError), match='[Ww]eights'):
            run.grad()


def test_a_window_stores_no_rows_of_synapses():
    """Of 40 steps and 4 samples: not two arrays of a value a synapse and row."""
    with traceops.configured(window=40):
        run = start(traceops.compile, net('csr'), 'es', 40)
    text = compiled(run.eager_grad).as_text()
    synapses = PATTERNS['csr']().indices.size
    assert synapses > 20 and f'[{synapses},160]' not in text and f'[160,{synapses}]' not in text
