# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients, losses and states equal upstream's: nets x rules x modes x lengths x windows.

The full product of the five has some 4000 cases and takes ten hours. `make test-all` runs every
combination of net, rule and mode, each with one length and window, which rotate so that every
pair of values of any two of the five comes up (``test_the_thinned_product_has_every_pair``).
`make test` runs a part of each: every net, every rule, every length and window.
"""

import itertools
import re
import warnings

import brainstate
import pytest
from jax.errors import UnexpectedTracerError

from tests.parity.harness import RULES, assert_close, assert_same_states, both, pair
from tests.parity.nets import NETS, spike_rate
from traceops.host.rule import Rule


def compare(name, rule, vmap, steps, window, tolerance, carry=True, **settings):
    net = NETS[name]
    if vmap and net.not_vmapped:
        pytest.skip(net.not_vmapped)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        upstream, ours = pair(net, rule, steps, vmap, window=window, carry_trace=carry,
                              **settings)
    # the feed-forward form of OSTL has none of the coupling for which upstream serves a net
    engine = 'window' if rule == 'ostl-ff' else net.engine
    assert ours.inner.traceops_plan.engine == engine or rule.startswith('es')
    if net.spiking:
        assert spike_rate(net, ours.x) > 0.01
    if vmap and rule == 'eprop':        # upstream cannot; of a sparse product brainevent says so
        error, said = (AssertionError, 'must have the same shape') if name == 'sparse' else (
            UnexpectedTracerError, None)
        with pytest.raises(error, match=said):
            upstream.grad()
        return
    programs = {run.learner: run.program() for run in (upstream, ours)}
    for _ in range(1 + carry):      # the second call starts from the trace that the first left
        want, got = both(upstream, ours, lambda run: programs[run.learner]())
        assert_close(want, got, tolerance, nonzero=True)
        if carry:
            assert_same_states(upstream, ours, tolerance)
    return ours


#: Nets that are compared in batch mode only, unless all is run: another net has their op, or
#: their number of states, under vmap.
_ONCE = ('vanilla', 'gru', 'lstm', 'lif', 'two-layer', 'three-states', 'four-states',
         'five-states', 'lora', 'grouped', 'two-groups', 'transformed', 'shared-weight',
         'shared-axis')

#: D-RTRL of these is compared under vmap (in batch mode, ALIF's is among the lengths and windows).
_VMAPPED = ('alif', 'noisy', 'bypass', 'elementwise', 'embedding', 'sparse', 'plain')


#: ES-D-RTRL of these is compared in another test: lengths and windows, all steps at once, random
#: numbers, under vmap.
_FACTORISED = ('alif', 'noisy', 'bypass', 'embedding', 'sparse')


def _quick(name, rule, vmap):
    if name in _ONCE:
        return rule == 'd_rtrl' and not vmap and name != 'four-states'      # three and five are
    if rule == 'es':
        return name not in _FACTORISED
    return vmap or name not in _VMAPPED


@pytest.mark.parametrize('name, rule, vmap', [
    pytest.param(name, rule, vmap, id=f'{name}-{rule}-{"vmap" if vmap else "batch"}',
                 marks=[] if _quick(name, rule, vmap) else pytest.mark.slow)
    for name in NETS for rule, vmap in (('d_rtrl', False), ('d_rtrl', True), ('es', False))])
def test_every_net(float64, name, rule, vmap):
    compare(name, rule, vmap, 7, 3, 1e-10)


@pytest.mark.parametrize('name, rule, vmap', [
    ('alif', 'd_rtrl', True), pytest.param('alif', 'es', True, marks=pytest.mark.slow),
    ('lstm', 'es', False), ('noisy', 'eprop', False), ('bypass', 'd_rtrl', False),
    ('bypass', 'es', False)])
def test_all_steps_at_once(float64, name, rule, vmap):
    """The form for GPUs, from its references."""
    compare(name, rule, vmap, 7, 3, 1e-10, two_phase=True)


def test_a_net_that_draws_random_numbers_at_once():
    """Its keys are had ahead of the simulation, which can be a kernel then."""
    ours = compare('noisy', 'es', False, 7, None, 1e-5, two_phase=True)
    said = ours.inner._last_call[1]
    assert 'the loop: kernels run on NVIDIA GPUs' in said, said


@pytest.mark.parametrize('rule, steps', [
    ('d_rtrl', 12), pytest.param('es', 10, marks=pytest.mark.slow)])     # es: in a loop by hand
def test_iterations_of_several_steps(float64, rule, steps):
    """There the loops over time take five steps an iteration, and the remaining ones after it; the
    loop of a readout takes all of them.
    """
    loops = {}
    for two_phase in (False, True):
        ours = compare('alif', rule, False, steps, None, 1e-10, two_phase=two_phase)
        program = str(brainstate.transform.make_jaxpr(ours.eager_grad)())
        loops[two_phase] = set(re.findall(r'\blength=(\d+).*?\bunroll=(\d+)', program, re.S))
    n = str(steps)
    assert loops == {False: {(n, '1')}, True: {(n, '5'), (n, n)}}


@pytest.mark.parametrize('name', [
    'alif', pytest.param('lstm', marks=pytest.mark.slow), 'sparse', 'embedding'])
def test_factorised_under_vmap(float64, name):
    compare(name, 'es', True, 7, 3, 1e-10)


@pytest.mark.parametrize('rule', [      # those two are among the lengths and windows
    pytest.param(rule, marks=pytest.mark.slow if rule in ('d_rtrl', 'es') else [])
    for rule in RULES])
def test_every_rule(float64, rule):
    compare('alif', rule, False, 7, None, 1e-10)


#: D-RTRL and e-prop share an engine; several windows of ES-D-RTRL are in the fifty steps.
_TRIED_BY_ANOTHER = (('d_rtrl', 2, 2), ('es', 2, 1), ('eprop', 2, 1), ('d_rtrl', 2, 1),
                     ('eprop', 1, 1), ('eprop', 50, 3))


@pytest.mark.parametrize('rule, steps, window', [
    pytest.param(rule, steps, window,
                 marks=pytest.mark.slow if (rule, steps, window) in _TRIED_BY_ANOTHER else [])
    for rule in ('d_rtrl', 'es', 'eprop')
    for steps, window in ((1, 1), (2, 1), (2, 2), (50, 3))])
def test_lengths_and_windows(float64, rule, steps, window):
    compare('alif', rule, False, steps, window, 1e-10)


@pytest.mark.parametrize('name, rule', [
    pytest.param(name, rule, marks=[] if (name, rule) in (('alif', 'd_rtrl'), ('gru', 'es'))
                 else pytest.mark.slow) for name in NETS for rule in ('d_rtrl', 'es')])
def test_float32(name, rule):
    compare(name, rule, False, 7, 3, 1e-5)


#: Every length with every window that it can have.
WINDOWS = [(T, K) for T in (1, 2, 7, 50) for K in sorted({1, 3, T}) if K <= T]


def product():
    """``(net, rule, vmap, T, K)``: all of the first three, the last two rotating."""
    cases = []
    for i, (name, net) in enumerate(NETS.items()):
        possible = [(rule, vmap) for rule in RULES for vmap in (False, True)
                    if not (vmap and net.not_vmapped)
                    # upstream takes no coupled recurrence through a convolution
                    and not (rule == 'ostl' and name == 'conv')]
        cases += [(name, rule, vmap, *WINDOWS[(i + k) % len(WINDOWS)])
                  for k, (rule, vmap) in enumerate(possible)]
    return cases


def test_the_thinned_product_has_every_pair():
    cases = product()
    axes = [*zip(*cases, strict=True)][:3] + [[case[3:] for case in cases]]
    values = [list(NETS), list(RULES), [False, True], WINDOWS]
    for (p, u), (q, v) in itertools.combinations(zip(axes, values, strict=True), 2):
        impossible = {(n, True) for n in NETS if NETS[n].not_vmapped} | {('conv', 'ostl')}
        assert set(itertools.product(u, v)) - set(zip(p, q, strict=True)) <= impossible
    assert {T for T, _ in WINDOWS} == {1, 2, 7, 50} and len(WINDOWS) == 9


@pytest.mark.slow
@pytest.mark.parametrize('name, rule, vmap, steps, window', product())
def test_cross_product(float64, name, rule, vmap, steps, window):
    compare(name, rule, vmap, steps, window, 1e-10)


@pytest.mark.parametrize('name', ['alif', 'sparse', 'elementwise', pytest.param(
    'conv', marks=pytest.mark.cpu('cuDNN takes a convolution of float64 with errors of 4e-8'))])
def test_without_carrying(float64, name):
    ours = compare(name, 'd_rtrl', False, 7, None, 1e-10, carry=False)
    assert not ours.inner.etrace_bwg


@pytest.mark.parametrize('name, vmap', [
    ('alif', True), ('noisy', False), ('two-layer', False),
    pytest.param('gru', False, marks=pytest.mark.slow)])
def test_windows_replayed_from_one_simulation(float64, monkeypatch, name, vmap):
    """Without a trace, windows that stay in cache are taken from what is kept of all steps."""
    monkeypatch.setattr(Rule, 'window_budget', lambda self, more=0: 2 ** 12)
    ours = compare(name, 'd_rtrl', vmap, 7, None, 1e-10, carry=False, memory_budget='1MiB')
    steps, *said = ours.inner._last_call[1].split()
    assert int(steps) < 7 and 'twice' not in said
