# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients made of spikes alone are upstream's; and which products look for spikes."""

import brainstate
import braintrace
import jax
import pytest

import traceops
from tests.parity import test_loops
from tests.parity.harness import assert_close, start
from tests.parity.nets import NETS
from tests.parity.test_rules import compare
from traceops.host import plan, relations
from traceops.host.explain_calls import LoopsExplanation
from traceops.kernels.trace_gradient import cpu, events

pytestmark = pytest.mark.cpu('sums over spikes are for a CPU')


@pytest.fixture
def counted(monkeypatch):
    """Products of any size are sums over spikes, of however many; and the shapes of those."""
    for name, value in (('_WORK', 0), ('_WIDTH', 1), ('_FEW', 1), ('_FEW_A_CORE', 0)):
        monkeypatch.setattr(events, name, value)
    monkeypatch.setattr(relations, '_LARGE', 0)
    shapes = []

    def made(inputs, delta, product, few):
        shapes.append((inputs.shape[1], delta.shape[1]))
        return events.product_of_events(inputs, delta, product, few)
    monkeypatch.setattr(cpu, 'product_of_events', made)
    return shapes


@pytest.mark.parametrize('name, rule, vmap, steps, window', [
    ('alif', 'd_rtrl', False, 7, None), ('alif', 'es', True, 7, 3), ('lif', 'es-rank', False, 1, 1),
    ('lif', 'es-pair', False, 2, 2),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('two-layer', 'es', False, 50, 3), ('lif', 'd_rtrl', True, 7, 3),
        ('lif', 'es-zero', False, 7, 7)))])
def test_gradients_of_spikes(float64, counted, name, rule, vmap, steps, window):
    compare(name, rule, vmap, steps, window, 1e-10, carry=rule != 'd_rtrl')
    assert set(counted) >= {(9, 6)}         # input and spikes, by neurons


@pytest.mark.parametrize('name, rule, vmap', [('alif', 'd_rtrl', False), ('lif', 'es', True)])
def test_gradients_of_a_loop(float64, counted, monkeypatch, name, rule, vmap):
    """Of a trace that is carried, too; and the loop says so."""
    monkeypatch.setattr(plan, 'SHORT', 0)
    loop, = test_loops.compare(test_loops.tutorial, name, rule, vmap=vmap)
    assert (9, 6) in counted and loop.events[0] == 'linear.weight'
    assert 'spikes enter linear.weight' in str(LoopsExplanation((loop,)))


def _program(name, rule, **settings):
    with traceops.configured(**settings):
        ours = start(traceops.compile, NETS[name], rule, 3)
    jax.block_until_ready(ours.grad())


@pytest.mark.parametrize('name, rule, settings', [
    ('gru', 'd_rtrl', {'carry_trace': False}), ('gru', 'es', {}), ('vanilla', 'es', {})])
def test_what_looks_for_none(counted, name, rule, settings):
    """Values that are no spikes."""
    _program(name, rule, **settings, window=3)
    assert not counted


def test_a_carried_trace_is_no_hindrance(counted):
    _program('lif', 'd_rtrl', window=3)
    assert counted


@pytest.mark.parametrize('made', [
    lambda v: (v > 0).astype(v.dtype), lambda v: jax.numpy.where(v > 0, 1., 0.)],
    ids=['compared', 'chosen'])
def test_a_spike_function_of_ones_own(float64, counted, made):
    """A comparison as a number or a choice between two, by whatever gradient, scaled."""
    jax.clear_caches()                  # products are counted when their program is made
    spike = jax.custom_jvp(made)
    spike.defjvp(lambda v, dv: (spike(*v), dv[0] / (1 + abs(v[0])) ** 2))

    class Own(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = braintrace.nn.Linear(5, 4)

        def init_state(self, batch_size=None, **kwargs):
            self.v = brainstate.HiddenState(brainstate.random.randn(batch_size, 4))

        def update(self, x):
            s = 3. * spike(self.v.value)
            self.v.value = .9 * self.v.value + self.linear(jax.numpy.concatenate([x, s], -1))
            return self.v.value

    x, grads = jax.numpy.ones((4, 2, 5 - 4)), []
    for compiler in (braintrace.compile, traceops.compile):
        brainstate.random.seed(0)
        with traceops.configured(carry_trace=False, window=4):
            learner = compiler(Own(), braintrace.D_RTRL, x[0], batch_size=2)
        grads.append(learner.etrace_grad(x, step_fn=lambda x, run=learner: (run(x) ** 2).mean()))
    assert_close(*grads, 1e-10, nonzero=True)
    assert counted == [(5, 4)]
    assert 'spikes enter linear.weight' in str(traceops.explain(learner))
