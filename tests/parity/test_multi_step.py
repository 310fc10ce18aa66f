# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``vjp_method='multi-step'`` given single steps: a step's signal is on the hidden values that it
starts from and pairs with the trace of the step before; the rest of its gradient is direct."""

import warnings

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity.harness import Run, assert_close, assert_same_states, both, start
from tests.parity.nets import N_IN, NETS
from tests.parity.test_loops import BOTH, compare, some, tutorial
from traceops.host import plan

T = 7
MULTI = {'vjp_method': 'multi-step'}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(plan, 'SHORT', 0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def pair(net, rule, vmap=False, **settings):
    upstream = start(braintrace.compile, NETS[net], rule, T, vmap, **MULTI)
    with traceops.configured(**settings):
        ours = start(traceops.compile, NETS[net], rule, T, vmap, **MULTI)
    return upstream, ours


def by_hand(run):
    """The vanilla net's gradients, summed over the steps: ``e_t = D e_{t-1} + x_t f_t``."""
    model, x, y = run.model, np.asarray(run.x), np.asarray(run.y)
    W, b = np.asarray(model.w.value), np.asarray(model.b.value)
    out = {k: np.asarray(v) for k, v in model.out.weight.value.items()}
    B, N = x.shape[1], W.shape[1]
    h, eW, eb = np.zeros((B, N)), np.zeros((B, *W.shape)), np.zeros((B, N))
    dW, db, dV, dc = (np.zeros_like(a) for a in (W, b, out['weight'], out['bias']))
    for x_t, y_t in zip(x, y, strict=True):
        z = np.concatenate([x_t, h], -1)
        a = np.tanh(z @ W + b)
        f = 1 - a ** 2
        new = 0.8 * h + a
        error = 2 * (new @ out['weight'] + out['bias'] - y_t) / y_t.size
        on_new = error @ out['weight'].T
        before = 0.8 * on_new + (on_new * f) @ W[N_IN:].T      # all of dL_t/dh_{t-1}
        dW += np.einsum('bo,bio->io', before, eW) + z.T @ (on_new * f)
        db += (before * eb).sum(0) + (on_new * f).sum(0)
        dV += new.T @ error
        dc += error.sum(0)
        eW = 0.8 * eW + z[:, :, None] * f[:, None, :]
        eb = 0.8 * eb + f
        h = new
    return {('w',): dW, ('b',): db, ('out', 'weight'): {'weight': dV, 'bias': dc}}


@pytest.mark.parametrize('window', [pytest.param(None, marks=pytest.mark.slow), 3])
def test_the_definition(float64, window):
    upstream, ours = pair('vanilla', 'd_rtrl', window=window)
    want, (got, _) = by_hand(ours), ours.grad(reduction='sum')
    assert ours.inner._last_call[0] == 'window'
    for path in want:
        assert_close(want[path], jax.tree.map(np.asarray, got[path]), 1e-10, nonzero=True)
    if window is None:
        assert_close(want, jax.tree.map(np.asarray, dict(upstream.grad(reduction='sum')[0])),
                     1e-10)


SETTINGS = {'3': {'window': 3}, 'all': {}, 'at once': {'window': 3, 'two_phase': True}}


@some('net, rule, vmap, name', (('lif', 'alif', 'gru', 'two-groups', 'bypass', 'lora'), (
    'd_rtrl', 'es', 'es-pair', 'ostl'), (True, False), SETTINGS), [
    ('lif', 'es', False, 'all'), ('alif', 'd_rtrl', True, '3')])
def test_etrace_grad(float64, net, rule, vmap, name):
    upstream, ours = pair(net, rule, vmap, **SETTINGS[name])
    for _ in range(2):                  # the second from the trace that the first left
        want, got = both(upstream, ours, Run.grad)
        assert_close(want, got, 1e-10, nonzero=True)
    assert ours.inner._last_call[0] == 'window'
    assert_same_states(upstream, ours, 1e-10)


@some('net, vmap', (('alif', 'gru'), (True, False)), [('alif', True)])
def test_without_a_trace(float64, net, vmap):
    upstream, ours = pair(net, 'd_rtrl', vmap, carry_trace=False, window=3)
    want, got = both(upstream, ours, Run.grad)
    assert_close(want, got, 1e-10, nonzero=True)


@some('net, rule, vmap', (('gru', 'lif'), BOTH, (True, False)), [
    ('gru', 'd_rtrl', False), ('lif', 'es', True)])
def test_loops_written_by_hand(float64, net, rule, vmap):
    compare(tutorial, net, rule, vmap=vmap, settings={'window': 3}, **MULTI)


def test_a_step_by_hand(float64):
    upstream, ours = pair('gru', 'es')

    def call(run):
        grad = brainstate.transform.grad(run.loss, run.inner.param_states)
        return [grad(run.x[t], run.y[t]) for t in range(2)]
    want, got = both(upstream, ours, lambda run: brainstate.transform.jit(lambda: call(run))())
    assert_close(want, got, 1e-10, nonzero=True)
    assert_same_states(upstream, ours, 1e-10)


@some('rule', (BOTH,), [('es',)])
def test_several_steps_a_call_are_upstreams(float64, rule):
    """Chunks, asked for by name or given by the step function."""
    def asked(run):
        def step(x, y):
            return ((run.learner(braintrace.MultiStepData(x)) - y) ** 2).mean((1, 2))
        return run.learner.etrace_grad(run.x[:6], run.y[:6], step_fn=step, chunk_size=2)

    def given(run):
        def step(x, y):
            return ((run.learner(braintrace.MultiStepData(x)) - y) ** 2).mean()
        return run.learner.etrace_grad(
            *(a[:6].reshape(3, 2, *a.shape[1:]) for a in (run.x, run.y)), step_fn=step)

    upstream, ours = pair('vanilla', rule, window=2)
    for call in (asked, given):
        want, got = both(upstream, ours, call)
        assert_close(want, got, 0., nonzero=True)
        assert ours.inner._last_call[0] == 'per-step'
    assert 'several steps at once' in ours.inner._last_call[1]
    assert_same_states(upstream, ours, 0.)


def test_a_filtered_trace_says_why_not(float64):
    ours = start(traceops.compile, NETS['vanilla'], 'eprop', T, **MULTI)
    assert "vjp_method='single-step'" in traceops.explain(ours.learner).rows[0].instead
    assert jnp.isfinite(ours.grad()[1]).all()
