# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights that the op transforms: masked, signed, squared, standardised; products of two."""

import pathlib
import re

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity.harness import (
    BATCH,
    assert_close,
    assert_same_states,
    both,
    pair,
    programs,
    start,
)
from tests.parity.nets import N_IN, NETS, Hidden, N, Net, _weight
from traceops.host.relations import relation_views

pytestmark = pytest.mark.usefixtures('float64')

MASK = np.where(np.random.RandomState(1).rand(N_IN + N, N) < 0.5, 1., 0.)


def normalised(w):
    return w / jnp.sqrt(jnp.sum(w ** 2, 0, keepdims=True))


TRANSFORMS = {
    'masked': lambda w: w * MASK,
    'signed': lambda w: jnp.abs(w) * (2 * MASK - 1),
    'clipped': lambda w: jnp.where(w > 0, w ** 2, 0.1 * w),
    'normalised': normalised,
    'mixed': lambda w: w / jnp.sqrt(jnp.sum(w ** 2)),
    'two outputs mixed': lambda w: w.at[:, 5].add(w[:, 4] ** 2),
}


def net(transform, states=1, bias=False):
    class Transformed(Hidden):
        def make(self):
            self.w, self.b = _weight(N_IN + N, N), _weight(N) if bias else None

        def op(self, x, h):
            return braintrace.matmul(
                jnp.concatenate([x, h], -1), self.w.value, self.b.value if bias else None,
                weight_fn=TRANSFORMS.get(transform), bias_fn=jnp.sin if bias else None)

    class Adaptive(Transformed):
        def init_state(self, batch_size=None, **kwargs):
            super().init_state(batch_size, **kwargs)
            self.a = brainstate.HiddenState(jnp.zeros_like(self.h.value))

        def update(self, x):
            h, a = self.h.value, self.a.value
            self.h.value = jnp.tanh(0.6 * h + self.op(x, h) - 0.3 * a)
            self.a.value = 0.9 * a + 0.2 * h
            return self.h.value @ jnp.asarray(np.random.RandomState(3).randn(N, 2), float)
    return Net(Transformed if states == 1 else Adaptive)


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def low_rank(states=1, bias=True, functions=True):
    """A product with two matrices, each transformed."""
    class LowRank(type(net('masked', states).make())):
        def make(self):
            self.B, self.A = _weight(N_IN + N, 3), _weight(3, N)
            self.b = _weight(N) if bias else None

        def op(self, x, h):
            return braintrace.lora_matmul(
                jnp.concatenate([x, h], -1), self.B.value, self.A.value, alpha=0.7,
                bias=self.b.value if bias else None,
                **({'b_fn': jnp.sin, 'a_fn': jnp.tanh, 'bias_fn': jnp.sin} if functions else {}))
    return Net(LowRank)


@pytest.mark.parametrize('transform, rule, vmap, options', [
    ('low rank', 'd_rtrl', False, {'states': 2}),
    _slow('low rank', 'd_rtrl', True, {'bias': False}),
    _slow('low rank', 'eprop', False, {'states': 2, 'functions': False}),
    ('masked', 'd_rtrl', False, {'states': 2, 'bias': True}),
    ('signed', 'd_rtrl', True, {'states': 2}),
    _slow('clipped', 'd_rtrl', True, {'bias': True}), ('clipped', 'eprop', False, {}),
    (None, 'd_rtrl', False, {'bias': True}),
    _slow('signed', 'eprop', False, {'states': 2}), _slow('masked', 'ostl', False, {}),
])
def test_as_upstream(transform, rule, vmap, options):
    """Windows of three of seven steps; weights that change between calls, and a warm-up."""
    one = low_rank(**options) if transform == 'low rank' else net(transform, **options)
    want, got = pair(one, rule, 7, vmap, window=3)
    grad = programs(want, got)
    for i in range(2):
        a, b = both(want, got, grad)
        assert_close(a, b, 1e-10, nonzero=True)
        assert_same_states(want, got, 1e-10)
        scale = 0.8 + 0.1 * i
        for run in (want, got):
            for state in run.model.states(brainstate.ParamState).values():
                state.value = jax.tree.map(lambda a, s=scale: a * s - 0.01, state.value)
        both(want, got, lambda run: brainstate.transform.jit(
            lambda: run.learner.etrace_evolve(run.x))())
        assert_same_states(want, got, 1e-10)
    assert got.inner._last_call[0] == 'window'
    assert 'pass a step' not in str(traceops.explain(got.learner))


@pytest.mark.parametrize('name, vmap', [
    ('grouped', False), ('embedding', False), _slow('grouped', True), _slow('embedding', True),
    _slow('lora', True)])
def test_matrices_in_another_form(name, vmap):
    """A matrix for each group, a table that indices choose from."""
    want, got = pair(NETS[name], 'd_rtrl', 7, vmap, window=3)

    def call(run):
        run.learner.etrace_evolve(run.x)
        return run.eager_grad(), run.eager_grad()
    a, b = both(want, got, lambda run: brainstate.transform.jit(lambda: call(run))())
    assert_close(a, b, 1e-10, nonzero=True)
    assert_same_states(want, got, 1e-10)
    assert all(v.has_closed_form(got.inner) for v in relation_views(got.inner))


def test_the_page_names_every_operation_of_upstreams():
    page = pathlib.Path(__file__).parents[2] / 'docs' / 'guides' / 'large-nets.md'
    registered = {name.removesuffix('_p') for name in dir(braintrace._op)
                  if name.startswith('etp_') and name.endswith('_p')}
    assert set(re.findall(r'`(etp_\w+)`', page.read_text())) == registered and len(registered) > 9


def test_an_embedding_of_as_many_tokens_as_samples_is_not_taken_for_a_product():
    class Few(type(NETS['embedding'].make())):
        def make(self):
            self.table = _weight(BATCH, N)
    view, *_ = relation_views(start(traceops.compile, Net(Few, tokens=True), 'd_rtrl', 3).inner)
    assert view.relation.x_var.aval.shape == (BATCH,) and not view.is_dense


@pytest.mark.parametrize('vmap', [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_transform_that_mixes_weights_takes_a_pass_a_step(vmap):
    want, got = pair(net('normalised', states=2), 'd_rtrl', 7, vmap, window=3)
    for _ in range(2):
        a, b = both(want, got, lambda run: run.grad())
        assert_close(a, b, 1e-10, nonzero=True)
    assert_same_states(want, got, 1e-10)
    assert 'is transformed' in ' '.join(str(traceops.explain(got.learner)).split())
    assert not any(v.has_closed_form(got.inner) for v in relation_views(got.inner))


@pytest.mark.parametrize('transform', ['mixed', 'two outputs mixed'])
def test_a_transform_that_mixes_outputs_is_upstreams(transform):
    """Whose trace follows each weight's own output. ES-D-RTRL has no such trace."""
    want, got = pair(net(transform), 'd_rtrl', 7, window=3)
    a, b = both(want, got, lambda run: run.grad())
    assert_close(a, b, 1e-10, nonzero=True)
    said = ' '.join(str(traceops.explain(got.learner)).split())
    assert 'weight_fn acts neither on each weight alone nor on those of each output' in said
    want, got = pair(net(transform), 'es', 7, window=3)
    a, b = both(want, got, lambda run: run.grad())
    assert_close(a, b, 1e-10, nonzero=True)
    assert got.inner._last_call[0] == 'window'


def test_the_trace_of_a_masked_weight_is_no_loop(monkeypatch):
    """Nothing rolls a trace from step to step."""
    monkeypatch.setattr('traceops.host.upstream.roll_step', None)
    _, got = pair(net('masked'), 'd_rtrl', 7)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(got.grad()[0])) > 0
