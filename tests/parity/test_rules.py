# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients, losses and states equal upstream's: nets x rules x modes x lengths x windows."""

import warnings

import pytest
from jax.errors import UnexpectedTracerError

from tests.parity.harness import RULES, assert_close, assert_same_states, both, pair
from tests.parity.nets import NETS, spike_rate


def compare(name, rule, vmap, steps, window, tolerance, carry=True):
    net = NETS[name]
    if vmap and net.not_vmapped:
        pytest.skip(net.not_vmapped)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        upstream, ours = pair(net, rule, steps, vmap, window=window, carry_trace=carry)
    assert ours.inner.traceops_plan.engine == net.engine or rule.startswith('es')
    if net.spiking:
        assert spike_rate(net, ours.x) > 0.01
    if vmap and rule == 'eprop':
        with pytest.raises(UnexpectedTracerError):
            upstream.grad()
        return
    want, got = both(upstream, ours, lambda run: run.grad())
    assert_close(want, got, tolerance, nonzero=True)
    if carry:
        assert_same_states(upstream, ours, tolerance)
        # a second call starts from the carried trace
        want, got = both(upstream, ours, lambda run: run.grad(reduction='sum'))
        assert_close(want, got, tolerance, nonzero=True)
    return ours


@pytest.mark.parametrize('rule, vmap', [('d_rtrl', False), ('d_rtrl', True), ('es', False)],
                         ids=['d_rtrl-batch', 'd_rtrl-vmap', 'es-batch'])
@pytest.mark.parametrize('name', NETS)
def test_every_net(float64, name, rule, vmap):
    compare(name, rule, vmap, 7, 3, 1e-10)


@pytest.mark.parametrize('name', ['alif', 'lstm', 'sparse', 'embedding'])
def test_factorised_under_vmap(float64, name):
    compare(name, 'es', True, 7, 3, 1e-10)


@pytest.mark.parametrize('rule', RULES)
def test_every_rule(float64, rule):
    compare('alif', rule, False, 7, None, 1e-10)


@pytest.mark.parametrize('steps, window', [(1, 1), (2, 1), (2, 2), (50, 3)])
@pytest.mark.parametrize('rule', ['d_rtrl', 'es', 'eprop'])
def test_lengths_and_windows(float64, rule, steps, window):
    compare('alif', rule, False, steps, window, 1e-10)


@pytest.mark.parametrize('rule', ['d_rtrl', 'es'])
@pytest.mark.parametrize('name', ['alif', 'lstm'])
def test_float32(name, rule):
    compare(name, rule, False, 7, 3, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('window', [1, 3, 'T'])
@pytest.mark.parametrize('steps', [1, 2, 7, 50])
@pytest.mark.parametrize('vmap', [False, True], ids=['batch', 'vmap'])
@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('name', NETS)
def test_cross_product(float64, name, rule, vmap, steps, window):
    window = steps if window == 'T' else window
    if window > steps:
        pytest.skip('a window longer than the sequence is an error, tested elsewhere')
    if rule == 'ostl' and name == 'conv':
        pytest.skip('upstream takes no coupled recurrence through a convolution')
    compare(name, rule, vmap, steps, window, 1e-10)


@pytest.mark.parametrize('name', ['alif', 'sparse', 'conv', 'elementwise'])
def test_without_carrying(float64, name):
    ours = compare(name, 'd_rtrl', False, 7, None, 1e-10, carry=False)
    assert not ours.inner.etrace_bwg
