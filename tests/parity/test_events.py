# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients made of spikes alone are upstream's; and which products look for spikes."""

import brainevent
import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saiunit as u

import traceops
from tests.parity import test_loops
from tests.parity.harness import assert_close, assert_same_states, both, pair, programs, start
from tests.parity.nets import N_IN, NETS, N, Net, Spiking, spike_rate
from tests.parity.test_rules import compare
from traceops.host import plan, relations
from traceops.host.explain_calls import LoopsExplanation
from traceops.kernels.sparse_trace_gradient import cpu as sparse_cpu
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


class SparseSpiking(Spiking):
    """The same with synapses: half of all pairs."""

    def __init__(self):
        super().__init__()
        there = np.random.RandomState(1).rand(N_IN + N, N) < 0.5
        dense = there * u.get_magnitude(self.linear.weight.value['weight'])
        synapses = braintrace.nn.SparseLinear(brainevent.CSR.fromdense(jnp.asarray(dense)))
        self.linear = brainstate.nn.Sequential(synapses, lambda y: y * u.mA)


@pytest.mark.parametrize('rule, vmap, carry', [
    ('es', False, True), ('es', True, True), ('d_rtrl', False, True), ('d_rtrl', True, False)])
def test_gradients_of_synapses(float64, monkeypatch, rule, vmap, carry):
    """A spike at a time, in windows of three, that of the input that enters one among them."""
    monkeypatch.setattr(relations, '_LARGE', 0)
    monkeypatch.setattr(sparse_cpu, '_WORK', 0)
    added = []

    def of_spikes(x, *operands):
        added.append(x.shape[1])
        return of_all(x, *operands)
    of_all = sparse_cpu._of_spikes
    monkeypatch.setattr(sparse_cpu, '_of_spikes', of_spikes)
    monkeypatch.setattr(sparse_cpu, '_capacity', lambda rows, width, *_: rows * width)
    net = Net(SparseSpiking, spiking=True)
    assert spike_rate(net, net.inputs(7, 4)) > 0.01
    want, got = pair(net, rule, 7, vmap, window=3, carry_trace=carry)
    grad = programs(want, got)
    for _ in range(1 + carry):
        assert_close(*both(want, got, grad), 1e-10, nonzero=True)
    if carry:
        assert_same_states(want, got, 1e-10)
    assert set(added) == {N_IN + N}
    assert 'spikes enter linear.layers.0.weight' in str(traceops.explain(got.learner))


def test_indices_are_not_computed_with_while_compiling(monkeypatch):
    """Of the input that enters a window, too: upstream's own takes seconds for a large pattern."""
    monkeypatch.setattr(relations, '_LARGE', 0)
    with traceops.configured(window=3):
        ours = start(traceops.compile, Net(SparseSpiking, spiking=True), 'es', 7)
    assert 'cumsum' not in str(brainstate.transform.make_jaxpr(ours.eager_grad)()[0])


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
    lambda v: (v > 0).astype(v.dtype), lambda v: jnp.where(v > 0, 1., 0.)],
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
            self.v.value = .9 * self.v.value + self.linear(jnp.concatenate([x, s], -1))
            return self.v.value

    x, grads = jnp.ones((4, 2, 5 - 4)), []
    for compiler in (braintrace.compile, traceops.compile):
        brainstate.random.seed(0)
        with traceops.configured(carry_trace=False, window=4):
            learner = compiler(Own(), braintrace.D_RTRL, x[0], batch_size=2)
        grads.append(learner.etrace_grad(x, step_fn=lambda x, run=learner: (run(x) ** 2).mean()))
    assert_close(*grads, 1e-10, nonzero=True)
    assert counted == [(5, 4)]
    assert 'spikes enter linear.weight' in str(traceops.explain(learner))
