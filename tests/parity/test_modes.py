# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""In every mode of jax a call does what it does upstream."""

import contextlib
import os
import subprocess
import sys
import warnings

import brainstate
import braintools
import braintrace
import jax
import jax.numpy as jnp
import pytest

import traceops
from tests.parity.harness import Run, assert_close, assert_same_states, both, jitted, pair
from tests.parity.nets import N_IN, N_OUT, NETS, N, Net
from traceops.host import loops, plan


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def outcome(call):
    """What a call returns, or the error that it raises."""
    def attempt(run):
        try:
            return call(run)
        except Exception as err:
            return err
    return attempt


@pytest.mark.usefixtures('compiled_quickly')
@pytest.mark.parametrize('rule, settings', [
    ('d_rtrl', {}), pytest.param('es', {}, marks=pytest.mark.slow), ('es', {'two_phase': True})])
def test_strict_promotion(rule, settings):
    upstream, ours = pair(NETS['alif'], rule, 5, window=3, **settings)
    with jax.numpy_dtype_promotion('strict'):
        want, got = both(upstream, ours, Run.grad)
    assert ours.inner._last_call[0] == 'window'
    assert_close(want, got, 1e-5, nonzero=True)
    assert_same_states(upstream, ours, 1e-5)


@pytest.mark.parametrize('call', [
    Run.eager_grad, lambda run: run.learner.etrace_evolve(run.x, return_outputs=True),
    lambda run: run.learner(run.x[0])], ids=['grad', 'evolve', 'step'])
def test_without_jit(call):
    """The steps are Python's, one by one, or what upstream says instead."""
    upstream, ours = pair(NETS['vanilla'], 'd_rtrl', 2)
    with jax.disable_jit():
        want, got = both(upstream, ours, outcome(call))
    if isinstance(want, Exception):
        assert type(want) is type(got) and str(want) == str(got)
    else:
        assert_close(want, got, 0., nonzero=True)
        assert_same_states(upstream, ours, 0.)
    assert not ours.inner._recorder.active


class Unbiased(brainstate.nn.Module):
    """Spikes and a threshold; nothing is added to an array of another rank."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(brainstate.random.randn(N_IN + N, N))
        self.out = brainstate.random.randn(N, N_OUT)

    def init_state(self, batch_size=None, **kwargs):
        size = (N,) if batch_size is None else (batch_size, N)
        self.v, self.a = (brainstate.HiddenState(jnp.zeros(size)) for _ in range(2))

    def update(self, x):
        v, a = self.v.value, self.a.value
        spikes = braintools.surrogate.ReluGrad()(v - 0.5 - a)
        drive = braintrace.matmul(jnp.concatenate([x, spikes], -1), self.w.value)
        self.v.value, self.a.value = 0.9 * v + drive - spikes, 0.95 * a + 0.2 * spikes
        return self.v.value @ self.out


def loop(run):
    weights = run.inner.param_states

    def body(total, now):
        grads, loss = brainstate.transform.grad(
            lambda: run.loss(*now), weights, return_value=True)()
        return jax.tree.map(jnp.add, total, grads), loss
    zeros = {k: jax.tree.map(jnp.zeros_like, w.value) for k, w in weights.items()}
    return (brainstate.transform.scan(body, zeros, (run.x[:4], run.y[:4])),
            jax.lax.scan(lambda c, x: (c + x.sum(), x), 0., run.x))


def steps(run):
    gradient = brainstate.transform.grad(run.loss, run.inner.param_states)
    return [gradient(x, y) for x, y in zip(run.x[:2], run.y[:2], strict=True)]


def evolve(run):
    """With an operation that is not differentiated, in a branch too."""
    def step(x):
        out = run.learner(x)
        return out, jax.lax.cond(x.sum() > 1., lambda: braintrace.matmul(x, jnp.ones((N_IN, 2))),
                                 lambda: jnp.zeros((*x.shape[:-1], 2)))
    return run.learner.etrace_evolve(run.x, step_fn=step, return_outputs=True)


WAYS = {'grad': Run.eager_grad, 'loop': loop, 'steps': steps, 'evolve': evolve}


def together(run):
    return {name: way(run) for name, way in WAYS.items()}


@contextlib.contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


MODES = {'rank promotion': lambda: jax.numpy_rank_promotion('raise'),
         'nan': lambda: jax.debug_nans(True), 'warnings': warnings_are_errors}


def runs(rule, steps=5):
    """Upstream's and ours."""
    return pair(Net(Unbiased), rule, steps, window=2)


@pytest.fixture
def every_loop(monkeypatch):
    """Short ones are deferred too."""
    monkeypatch.setattr(plan, 'SHORT', 0)


@pytest.mark.usefixtures('compiled_quickly', 'every_loop')
@pytest.mark.parametrize('mode, rule', [
    pytest.param(mode, rule, marks=[] if (mode, rule) in (
        ('rank promotion', 'd_rtrl'), ('nan', 'es'), ('warnings', 'd_rtrl')) else pytest.mark.slow)
    for mode in MODES for rule in ('d_rtrl', 'es')])
def test_a_mode_that_changes_nothing(mode, rule):
    """A sequence, a loop, steps by hand: each runs, ours in its own way."""
    upstream, ours = runs(rule)
    with traceops.enabled(), MODES[mode]():
        want, got = both(upstream, ours, jitted(together))
    assert_close(want, got, 1e-5, nonzero=True)
    assert_same_states(upstream, ours, 1e-5)
    assert ours.inner._last_call[0] == 'window' or rule == 'es'     # (evolve, the last)
    assert loops.known()[-1].deferred


@pytest.mark.usefixtures('compiled_quickly', 'every_loop')
@pytest.mark.parametrize('rule', ['d_rtrl', pytest.param('es', marks=pytest.mark.slow)])
def test_a_nan_is_found(rule):
    """Where a result has one, and only there: not where ``where`` hides it in the loop."""
    for run in runs(rule):
        loss, bad = run.loss, run.x.at[1].set(jnp.nan)
        with traceops.enabled(), jax.debug_nans(True):
            run.loss = lambda x, y, run=run: jnp.where(
                y < 9., (run.learner(x) - y) ** 2, jnp.log(-1. - y ** 2)).mean()
            for name in ('grad', 'loop'):
                jax.block_until_ready(jitted(WAYS[name])(run))
            run.loss, run.x = loss, bad
            for way in WAYS.values():
                with pytest.raises(FloatingPointError):
                    jax.block_until_ready(jitted(way)(run))


@pytest.mark.usefixtures('compiled_quickly')
@pytest.mark.parametrize('rule', ['d_rtrl', pytest.param('es', marks=pytest.mark.slow)])
def test_no_transfer_once_compiled(rule):
    upstream, ours = runs(rule)
    for run in (upstream, ours):
        with traceops.enabled():
            call = brainstate.transform.jit(lambda run=run: together(run))
            for _ in range(3):              # states are of the types that a call leaves
                want = call()
            with jax.transfer_guard('disallow'):
                jax.block_until_ready(call())
        assert max(float(jnp.abs(a).max()) for a in jax.tree.leaves(want)) > 0
    values = [jax.tree.leaves(run.states()) for run in (upstream, ours)]
    assert_close(*values, 1e-4)


@pytest.mark.usefixtures('compiled_quickly')
@pytest.mark.parametrize('mode', [
    lambda: jax.transfer_guard('disallow'),
    pytest.param(jax.checking_leaks, marks=pytest.mark.slow)], ids=['transfers', 'leaks'])
def test_errors_of_a_mode_are_upstreams(mode):
    """The first call transfers constants, and upstream's step leaks."""
    pair = runs('d_rtrl', 3)
    with traceops.enabled(), mode():
        want, got = map(outcome(jitted(Run.eager_grad)), pair)
    assert isinstance(want, Exception) and type(want) is type(got)
    assert str(want).split(':')[0] == str(got).split(':')[0]


@pytest.mark.usefixtures('compiled_quickly')
def test_a_plain_loop_beside_a_learner_leaks_nothing():
    runs('d_rtrl', 3)
    with traceops.enabled(), jax.checking_leaks():
        slope = jax.jit(jax.grad(lambda x: jax.lax.scan(
            lambda c, a: (c * a, c), x[0], x)[0]))(jnp.arange(1., 4.))
    assert slope.tolist() == [12., 3., 2.]


OPTIMISED = """
import warnings, jax, numpy as np, saiunit, brainstate, braintrace, traceops
from tests.parity.test_modes import together, runs
from traceops.host import plan
from tests.parity.harness import both, jitted, assert_close, assert_same_states
plan.SHORT = 0
brainstate.environ.set(dt=1. * saiunit.ms)
jax.config.update('jax_disable_most_optimizations', True)
for rule in ('d_rtrl', 'es'):
    upstream, ours = runs(rule)
    with traceops.enabled():
        want, got = both(upstream, ours, jitted(together))
    for a, b in zip(*map(jax.tree.leaves, (want, got)), strict=True):
        error, norm = np.linalg.norm(np.asarray(a) - np.asarray(b)), np.linalg.norm(a)
        if not error <= 1e-5 * max(norm, 1e-3):
            raise SystemExit(f'{rule}: {error} of {norm}')
    print(rule, bool(max(abs(np.asarray(a)).max() for a in jax.tree.leaves(got)) > 0),
          bool(traceops.explain(ours.learner).rows))
"""


@pytest.mark.slow
def test_flags_of_python():
    """Without asserts and docstrings; a warning while ours is imported, or runs, is an error."""
    code = f"""import sys, types, warnings
sys.modules['brainpy'] = types.ModuleType('brainpy')    # not to be had without docstrings
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    import braintools, braintrace, brainevent, pytest
{OPTIMISED}"""
    done = subprocess.run([sys.executable, '-OO', '-W', 'error', '-c', code], text=True,
                          capture_output=True,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': '.'})
    assert done.stdout == 'd_rtrl True True\nes True True\n', done.stderr
