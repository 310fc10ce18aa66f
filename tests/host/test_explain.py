# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""explain: one row per relation and group, the engine, and the reason."""

import json

import braintrace
import pytest

import traceops
from tests.parity.harness import start
from tests.parity.nets import NETS
from traceops.host import relations
from traceops.host.rule import Rule


def test_a_window_learner():
    run = start(traceops.compile, NETS['alif'], 'd_rtrl', 5)
    run.grad()
    found = traceops.explain(run.learner)
    assert [(r.parameter, r.states, r.engine, r.reason) for r in found.rows] == [
        ('linear.weight', 2, 'window', ''), ('readout.W', 1, 'window', '')]
    trace = run.learner.etrace_bwg.values()
    sizes = sum(a.nbytes for st in trace for a in st.value.values())
    assert sum(r.trace_bytes for r in found.rows) == sizes and found.saved_bytes == 0
    assert '5 steps per window' in str(found) and 'carry_trace=False' in str(found)
    assert json.loads(json.dumps(found.to_dict()))['rows'][0]['engine'] == 'window'


def test_what_is_not_kept_is_saved():
    with traceops.configured(carry_trace=False):
        run = start(traceops.compile, NETS['alif'], 'd_rtrl', 5)
    found = traceops.explain(run.learner)
    assert found.saved_bytes == sum(r.trace_bytes for r in found.rows) > 0


@pytest.mark.parametrize('settings, twice', [
    ({'window': 2}, True), ({'memory_budget': 1024}, True), ({}, False)])
def test_windows_that_are_simulated_twice(monkeypatch, settings, twice):
    """Without a trace; where they were asked for, or memory for the states of all steps is not."""
    monkeypatch.setattr(Rule, 'window_budget', 1024)
    with traceops.configured(carry_trace=False, **settings):
        run = start(traceops.compile, NETS['alif'], 'd_rtrl', 7)
    run.grad()
    said = str(traceops.explain(run.learner))
    assert (', each simulated twice' in said) == twice and '7 steps per window' not in said


def test_gradients_that_are_summed_over_spikes(monkeypatch):
    """Large layers that spikes enter, where the trace takes no pass."""
    def noted(name, rule, **settings):
        with traceops.configured(**settings):
            made = start(traceops.compile, NETS[name], rule, 5).learner
        return [n for n in traceops.explain(made).notes if n.startswith('spikes enter')]
    assert not noted('lif', 'es')
    monkeypatch.setattr(relations, '_LARGE', 50)
    assert 'linear.weight:' in noted('lif', 'es')[0]
    assert noted('lif', 'd_rtrl', carry_trace=False) == noted('lif', 'es')
    assert not noted('lif', 'd_rtrl') and not noted('gru', 'es')


@pytest.mark.parametrize('make, engine, reason', [
    (lambda: start(braintrace.compile, NETS['lif'], 'd_rtrl', 3), 'upstream', 'made before'),
    (lambda: start(traceops.compile, NETS['shared-axis'], 'd_rtrl', 3), 'upstream', 'shares axis'),
    (lambda: start(traceops.compile, NETS['lif'], 'eprop', 3, vjp_method='multi-step'),
     'upstream', 'multi-step'),
    (lambda: start(traceops.compile, NETS['lif'], 'd_rtrl', 3, trace_dtype='bfloat16'),
     'upstream', 'rounds the trace'),
    (lambda: start(traceops.compile, NETS['lora'], 'd_rtrl', 3), 'window', 'no closed form'),
], ids=['upstream', 'shared-axis', 'multi-step', 'trace_dtype', 'lora'])
def test_every_refusal_has_a_reason(make, engine, reason):
    row = traceops.explain(make().learner).rows[0]
    assert row.engine == engine and reason in row.reason


def test_a_subclass_with_its_own_update_keeps_it():
    class Mine(braintrace.D_RTRL):
        def _solve_weight_gradients(self, *args):
            return super()._solve_weight_gradients(*args)
    run = start(traceops.compile, NETS['lif'], 'd_rtrl', 3)
    made = traceops.compile(run.model, Mine, run.x[0], batch_size=4)
    assert 'Mine overrides _solve_weight_gradients' in traceops.explain(made).rows[0].reason


def test_a_wrapper_made_outside_and_a_call_that_could_not_be_counted():
    run = start(traceops.compile, NETS['lif'], 'd_rtrl', 3, True)
    outside = braintrace.ETraceVmap(run.inner, vmap_states='new')
    row = traceops.explain(outside).rows[0]
    assert row.engine == 'per-step' and 'traceops.compile(..., vmap=True)' in row.reason
    run = start(traceops.compile, NETS['lif'], 'd_rtrl', 5)
    run.learner.etrace_grad(run.x, step_fn=lambda x: (run.learner(x) + run.learner(x)).sum())
    row = traceops.explain(run.learner).rows[0]
    assert row.engine == 'per-step' and 'calls the learner 2 times' in row.reason


def test_one_row_for_each_relation_and_group():
    run = start(traceops.compile, NETS['two-groups'], 'd_rtrl', 3)
    rows = traceops.explain(run.learner).rows
    assert [(r.parameter, r.primitive, r.states, r.x_shape, r.y_shape, r.rule) for r in rows] == [
        ('w', 'etp_mm', S, (4, 9), (4, 6), 'D_RTRL') for S in (1, 2)]
    assert {r.group for r in rows} == {0, 1} and {r.backend for r in rows} == {'jax'}


def test_what_is_no_learner():
    with pytest.raises(TypeError, match='takes a braintrace learner'):
        traceops.explain(3)
    with pytest.raises(ValueError, match='not compiled'):
        traceops.explain(traceops.D_RTRL(NETS['lif'].make()))
