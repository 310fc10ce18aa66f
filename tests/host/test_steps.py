# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A single step through the operations that have kernels, and a sample at a time: as upstream's,
to rounding.

On a GPU the first are what a step is lowered to; here they are called by force.
"""

import brainstate
import braintrace
import jax
import numpy as np
import pytest
import saiunit as u

import traceops
from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import of_case
from traceops.engine.step import Step
from traceops.host import steps
from traceops.ops import choice


def hand_driven(compiler, net, vmap, rule='D_RTRL', **options):
    """Gradients of five steps, each at the weights that the step before has left."""
    brainstate.environ.set(dt=1. * u.ms)
    training = of_case(Case('one', net, rule, 24, None, steps=5, batch=3, vmap=vmap, n_in=7))
    learner = compiler(training.model, training.algorithm, training.inputs[0],
                       **training.options, **options)
    weights = training.model.states(brainstate.ParamState)
    step = brainstate.transform.jit(lambda x: brainstate.transform.grad(
        lambda: (learner(x) ** 2).sum(), weights)())
    found = []
    for x in 40 * training.inputs:          # that they spike, from the first step on
        grads = step(x)
        for key, grad in grads.items():
            weights[key].value = jax.tree.map(lambda w, g: w - 0.01 * g, weights[key].value, grad)
        found.append(grads)
    return found


@pytest.fixture
def forced(monkeypatch):
    """Every step that may be fused is; what was."""
    over, taken = Step.over, []

    def fused(self, lanes, way=''):
        if self.programs['fused'] is not None:
            taken.append('gradient' if 'signal' in self.trees else 'update')
        return over(self, lanes, 'fused')
    monkeypatch.setattr(Step, 'over', fused)
    monkeypatch.setattr(choice, 'devices_needed', lambda: 'as if for a GPU')
    return taken


@pytest.mark.usefixtures('compiled_quickly')
@pytest.mark.parametrize('vmap', [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_fused_step_is_upstreams(forced, vmap):
    want = hand_driven(braintrace.compile, 'alif', vmap)
    got = hand_driven(traceops.compile, 'alif', vmap)
    assert {'update', 'gradient'} == set(forced)
    for a, b in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(want[1:]), strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert np.abs(b).max() > 0
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.cpu('a GPU takes all samples at once')
@pytest.mark.parametrize('net, options', [
    ('alif', {}), pytest.param('gru', {'vjp_method': 'multi-step'}, marks=pytest.mark.slow)])
def test_a_step_by_samples_is_upstreams(monkeypatch, net, options):
    """On a CPU, where the trace of one is large: no copies of it to add the samples up."""
    over, ways = Step.over, []
    monkeypatch.setattr(steps, '_LARGE', 0)
    monkeypatch.setattr(Step, 'over', lambda self, lanes, way='': (
        ways.append((way, 'signal' in self.trees, self.programs['by_sample'] is not None)),
        over(self, lanes, way))[1])
    want = hand_driven(braintrace.compile, net, False, **options)
    got = hand_driven(traceops.compile, net, False, **options)
    assert ('by_sample', True, True) in ways
    for a, b in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(want[1:]), strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    assert max(float(abs(a).max()) for a in jax.tree.leaves(got)) > 0


@pytest.mark.parametrize('net, rule', [('lif', 'D_RTRL'), ('alif', 'ES_D_RTRL')])
def test_other_steps_have_no_fused_form(forced, net, rule):
    """One state: XLA makes one pass of it already. A factorised trace: there is none of I x O."""
    hand_driven(traceops.compile, net, False, rule)
    assert not forced


@pytest.mark.parametrize('net, rule, reason', [
    ('alif', 'D_RTRL', 'kernels run on NVIDIA GPUs'), ('lif', 'D_RTRL', '2 to 8 states'),
    ('alif', 'ES_D_RTRL', '2 to 8 states')])
def test_what_takes_a_step_by_hand_can_be_asked(net, rule, reason):
    training = of_case(Case('one', net, rule, 24, None, steps=5, batch=3, n_in=7))
    learner = traceops.compile(training.model, training.algorithm, training.inputs[0],
                               **training.options)
    why = learner._steps.why()
    assert "upstream's program" in why and reason in why
