# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients of neurons with six states and more against each rule in NumPy, float64.

jaxlib 0.10.2 compiles upstream's own step of these wrongly for a CPU, in float32.
"""

import functools
import sys
import warnings

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity import nets, oracles
from tests.parity.harness import BATCH, RULES, Run
from tests.parity.harness import start as harness_start
from tests.parity.nets import NETS, Gif, N, gif
from traceops.host import faults, versions

STEPS = 8


def start(compiler, S, rule, vmap=False, inputs=3, scale=1., **settings):
    brainstate.random.seed(0)
    model = Gif(S)
    for weight in model.w.values():
        weight.value = scale * weight.value
    rng = np.random.RandomState(3)
    x = jnp.asarray(rng.rand(STEPS, BATCH, inputs) < 0.5, float)
    y = jnp.asarray(rng.randn(STEPS, BATCH, 2), float)
    cls, more = RULES[rule]
    with traceops.configured(window=5, **settings), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return Run(compiler(model, cls, x[0], batch_size=BATCH, vmap=vmap, **more), model, x, y)


@pytest.fixture
def double():
    """Double precision, to be left before the learner is made."""
    def enable(on):
        brainstate.environ.set(precision=64 if on else 32)
        jax.config.update('jax_enable_x64', on)
    yield enable
    enable(False)


@functools.cache
def wanted(S, rule, made=start):
    """The rule's own gradients, and spikes a neuron and step (in double precision)."""
    brainstate.random.seed(0)
    run = made(braintrace.compile, S, rule)
    model = run.model
    weights = {k: w.value * model.masks[k] for k, w in model.w.items()}
    found = oracles.records(
        model.inputs, gif, lambda states, y: ((model.output(states) - y) ** 2).mean(),
        weights, [jnp.zeros((BATCH, N))] * S, run.x, run.y)
    spikes = np.mean([now['x']['e'][:, -N:] for now in found])
    grads = oracles.RULES[rule](found)
    return {k: g * np.asarray(model.masks[k]) for k, g in grads.items()}, spikes


def by_op(grads):
    return {path[-1]: np.asarray(g, float) for path, g in grads.items()}


def error(want, got):
    return max(np.linalg.norm(want[k] - got[k]) / np.linalg.norm(want[k]) for k in want)


@pytest.mark.parametrize('S, rule, vmap, settings', [
    (7, 'd_rtrl', True, {}), (8, 'es', False, {}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (6, 'd_rtrl', False, {}),
        (8, 'd_rtrl', False, {}), (6, 'es', False, {}), (7, 'eprop', False, {}),
        (8, 'd_rtrl', True, {}), (8, 'es', True, {}), (8, 'eprop', False, {}),
        (6, 'd_rtrl', False, {'carry_trace': False}), (7, 'd_rtrl', False, {'two_phase': True}),
        (6, 'es', False, {'two_phase': True})))])
@pytest.mark.parametrize('precision', [32, pytest.param(64, marks=pytest.mark.slow)])
def test_the_rule_itself(double, S, rule, vmap, settings, precision):
    double(True)
    want, spikes = wanted(S, rule)
    assert spikes > 0.02 and all(np.linalg.norm(g) > 1e-3 for g in want.values())
    double(precision == 64)
    ours = start(traceops.compile, S, rule, vmap, **settings)
    got = by_op(ours.grad(reduction='sum')[0])
    assert ours.inner._last_call[0] == 'window'
    assert error(want, got) <= (1e-5 if precision == 32 else 1e-10)


@pytest.mark.parametrize('mode', [
    jax.disable_jit, functools.partial(jax.transfer_guard, 'disallow_explicit')],
    ids=['disable_jit', 'transfer_guard'])
def test_the_compiler_is_asked_alike_in_every_mode(mode):
    """In a step that is traced, too."""
    wrong, found = faults.miscompiles(), []
    with mode():
        found.append(faults.miscompiles.__wrapped__())
        with jax.disable_jit(False):
            jax.eval_shape(lambda: found.append(faults.miscompiles.__wrapped__()))
    assert found == [wrong, wrong]


def test_explain_names_what_is_compiled_wrongly(monkeypatch):
    ours = start(traceops.compile, 6, 'd_rtrl')
    for wrong in (True, False):
        monkeypatch.setattr(faults, 'miscompiles', lambda wrong=wrong: wrong)
        said = traceops.explain(ours.learner).notes
        assert any(faults.FUSION in note for note in said) == wrong


def test_what_each_version_trains():
    """A readout that no hidden state follows: zero in braintrace 0.2.6, not in 0.2.8."""
    upstream = harness_start(braintrace.compile, NETS['vanilla'], 'd_rtrl', 4)
    weight = upstream.grad()[0][('out', 'weight')]['weight']
    zero = versions.installed_versions()['braintrace'] == '0.2.6'
    assert (np.linalg.norm(weight) == 0) == zero
    assert faults.untrained(upstream.inner) == (['out.weight'] if zero else [])


class Chain(brainstate.nn.Module):
    """Two states of a neuron, the second of which reads the new or the old value of the first."""

    def __init__(self, new):
        super().__init__()
        self.new, self.linear = new, braintrace.nn.Linear(3, 5)
        self.a, self.b = (brainstate.HiddenState(jnp.zeros((2, 5))) for _ in 'ab')

    def begin(self):
        self.a.value, self.b.value = jnp.zeros((2, 5)), jnp.zeros((2, 5))

    def update(self, x):
        old = self.a.value
        self.a.value = .5 * old + self.linear(x)
        self.b.value = .9 * self.b.value + jnp.tanh(self.a.value if self.new else old)
        return self.b.value + (0. if self.new else self.a.value)


@pytest.mark.parametrize('new, times', [(True, 2.), (False, 1.)])
@pytest.mark.parametrize('compiler', [braintrace.compile, traceops.compile])
def test_a_state_that_reads_a_new_value_counts_twice(float64, compiler, new, times):
    """Upstream's D-RTRL, beside autodiff of one step; reproduced."""
    net, x = Chain(new), jnp.asarray(np.random.RandomState(0).randn(2, 3))
    weights = net.states(brainstate.ParamState)
    want = brainstate.transform.grad(lambda: (net(x) ** 2).sum(), weights)()
    net.begin()
    learner = compiler(net, braintrace.D_RTRL, x)
    net.begin()
    got = brainstate.transform.grad(lambda: (learner(x) ** 2).sum(), weights)()
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert np.linalg.norm(a) > 0
        np.testing.assert_allclose(b, times * a, rtol=1e-10)


def by_steps(run):
    """Steps by hand, whose trace is updated step by step."""
    weights = run.inner.param_states
    gradient = brainstate.transform.grad(run.loss, weights)

    def body(total, now):       # the loop reads the sum: it stays as it is written
        total = jax.tree.map(jnp.add, total, gradient(*now))
        return total, sum(a.sum() for a in jax.tree.leaves(total))
    zeros = {k: jax.tree.map(jnp.zeros_like, w.value) for k, w in weights.items()}
    return brainstate.transform.jit(
        lambda: brainstate.transform.scan(body, zeros, (run.x, run.y))[0])()


@pytest.mark.parametrize('S, vmap', [(6, False), *(
    pytest.param(S, vmap, marks=pytest.mark.slow)
    for S in (6, 7, 8) for vmap in (False, True) if S > 6 or vmap)])
def test_where_the_compiler_is_wrong(double, monkeypatch, S, vmap):
    """Of the sizes at which it is: windows, steps by hand, and what steps leave for a window."""
    monkeypatch.setattr(nets, 'N_IN', 40)
    monkeypatch.setattr(nets, 'N', 60)
    monkeypatch.setattr(sys.modules[__name__], 'N', 60)
    monkeypatch.setattr(Gif, 'shape', (60,))
    made = functools.partial(start, inputs=40, scale=0.2)
    double(True)
    want, spikes = wanted.__wrapped__(S, 'd_rtrl', made)
    assert spikes > 0.02 and all(np.linalg.norm(g) > 1e-3 for g in want.values())
    double(False)
    for call in (by_steps, lambda run: run.grad(reduction='sum')[0]):
        with traceops.enabled():
            ours = made(traceops.compile, S, 'd_rtrl', vmap)
            assert error(want, by_op(call(ours))) <= 1e-5
    halves = made(traceops.compile, S, 'd_rtrl', vmap)
    x, y, total = halves.x, halves.y, 0.
    for way, part in ((by_steps, slice(0, 3)), (lambda run: run.grad(reduction='sum')[0],
                                                slice(3, STEPS))):
        halves.x, halves.y = x[part], y[part]
        total = jax.tree.map(jnp.add, way(halves), total) if total else way(halves)
    assert error(want, by_op(total)) <= 1e-5
