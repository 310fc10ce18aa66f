# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory, read from compiled programs: no trace where none is carried, none that grows with T."""

import math
import re
import warnings

import jax
import pytest

import traceops
from tests.parity import harness, nets
from tests.parity.harness import compiled, start
from tests.parity.nets import NETS
from traceops.benchmarks import measure
from traceops.benchmarks.cases import Case
from traceops.compiler.program import trace_step
from traceops.compiler.shared_signal import SharedSignal
from traceops.host import drive, plan
from traceops.host.rules import make_rule


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def largest_array(program):
    """Elements of the largest array anywhere in a compiled program, fusions included."""
    shapes = re.findall(r'\b(?:pred|[suf]\d+|bf16)\[([\d,]*)\]', program.as_text())
    return max(math.prod(map(int, s.split(','))) for s in shapes if s)


@pytest.mark.parametrize('name, vmap', [
    ('alif', True),
    *(pytest.param(name, False, marks=pytest.mark.slow) for name in ('gru', 'lif', 'two-layer'))])
def test_no_array_of_batch_inputs_outputs(name, vmap, monkeypatch):
    """Sizes at which nothing else comes near: 3 steps, 16 samples, 24 neurons."""
    monkeypatch.setattr(harness, 'BATCH', 16)
    monkeypatch.setattr(nets, 'N', 24)
    sizes = {}
    for carry in (True, False):
        with traceops.configured(carry_trace=carry):
            run = start(traceops.compile, NETS[name], 'd_rtrl', 3, vmap)
        sizes[carry] = largest_array(compiled(run.grad))
    trace = 16 * 24 * 24
    assert sizes[True] >= trace                 # the search finds a trace where there is one
    assert sizes[False] < trace
    assert all(r.kept_bytes == 0 < r.trace_bytes for r in traceops.explain(run.learner).rows)


def makers(program, size):
    """Operations of a compiled program that make an array of ``size`` elements and more."""
    found = re.findall(r'= \(?(?:pred|[suf]\d+|bf16)\[([\d,]+)\]\S* ([\w-]+)\(', program.as_text())
    return {name for shape, name in found if math.prod(map(int, shape.split(','))) >= size}


@pytest.mark.parametrize('program, dead', [('made', True), ('reset before and after', True),
                                           ('reset before', False)])
def test_a_trace_that_the_program_itself_cannot_read_again_is_not_formed(
        program, dead, monkeypatch):
    """Made or reset in the same program. One that leaves the program is formed: who called it may
    look at it.
    """
    monkeypatch.setattr(harness, 'BATCH', 16)
    monkeypatch.setattr(nets, 'N', 24)
    def make():
        with traceops.configured(window=3):
            return start(traceops.compile, NETS['lif'], 'd_rtrl', 3)
    run = None if program == 'made' else make()

    def call():
        one = run or make()
        if program != 'made':
            one.learner.reset_state(16)
        out = one.eager_grad()
        if program == 'reset before and after':
            one.learner.reset_state(16)
        return out
    made = makers(compiled(call), 16 * 24 * 24)
    assert (made <= {'broadcast', 'fusion'}) == dead, made      # zeros


@pytest.mark.parametrize('rule, name, kept, shared_signals', [
    pytest.param('d_rtrl', 'lif', 1, 0, marks=pytest.mark.slow), ('d_rtrl', 'alif', 1, 0),
    pytest.param('es', 'alif', 1, 1, marks=pytest.mark.slow), ('es', 'two-layer', 1, 3)])
def test_one_value_of_each_neuron_is_kept(monkeypatch, rule, name, kept, shared_signals):
    """However many states it has; under ES-D-RTRL only of those that a product reads later."""
    programs = []

    def noted(*args, **kwargs):
        programs.append(trace_step(*args, **kwargs))
        return programs[-1]

    monkeypatch.setattr(drive, 'trace_step', noted)
    start(traceops.compile, NETS[name], rule, 8, True).grad()
    (program,) = programs
    assert sum(v.aval.shape[-1] == nets.N for v in program.partition.residuals) == kept
    record = program.out_tree.unflatten(program.places)['record']
    assert sum(isinstance(s, SharedSignal) for s in record['signal']) == shared_signals


def test_what_a_vmapped_alif_needs_does_not_grow_with_the_sequence():
    """Temporary memory for a fixed window, T = 100 and T = 10 000, one copy of the inputs off."""
    def temporary(steps):
        with traceops.configured(window=50):
            run = start(traceops.compile, NETS['alif'], 'd_rtrl', 100, True)
        x = jax.ShapeDtypeStruct((steps, *run.x.shape[1:]), run.x.dtype)
        program = compiled(lambda x: run.learner.etrace_grad(
            x, step_fn=lambda i: run.learner(i).sum() ** 2), x)
        return program.memory_analysis().temp_size_in_bytes
    step = 4 * harness.BATCH * nets.N_IN
    assert temporary(10_000) - temporary(100) <= 2 * step * 9_900 + 2 ** 16


@pytest.mark.cpu('programs for a GPU have a workspace of 32 MiB, beside which nothing is seen')
def test_a_record_that_is_folded_is_not_stored():
    """Two states: a window at once stores their Jacobian (4 arrays) and signal (2) of each step.

    Some take the place of what is done with; three arrays remain.
    """
    temporary = {}
    for at_once in (False, True):
        with traceops.configured(carry_trace=False, two_phase=at_once):
            run = start(traceops.compile, NETS['alif'], 'd_rtrl', 200, False)
        temporary[at_once] = compiled(run.grad).memory_analysis().temp_size_in_bytes
    array = 4 * 200 * harness.BATCH * nets.N
    assert temporary[True] - temporary[False] >= 2 * array


def test_the_window_of_factors_stays_in_cache():
    """Of ES-D-RTRL on a CPU, if it is not given; never more than the setting allows, less what
    gradients take.
    """
    def budget(at_once=False, **settings):
        with traceops.configured(**settings):
            run = start(traceops.compile, NETS['lif'], 'es', 8)
        return make_rule(run.inner, lanes=False, at_once=at_once).window_budget()
    assert budget() == 2 ** 24
    assert budget(memory_budget=4096) < 4096
    assert budget(memory_budget=512) == 288         # half of what gradients take, who take more
    assert 2 ** 30 - 2 ** 12 < budget(at_once=True) < 2 ** 30


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.cpu('programs for a GPU have a workspace of 32 MiB, beside which nothing is seen')
@pytest.mark.parametrize('name, rule', [
    ('gru', 'd_rtrl'), ('lif', 'es'), ('sparse', 'es'), *(
        _slow(name, rule) for name in (
            'alif', 'lora', 'embedding', 'elementwise', 'grouped', 'einsum', 'transformed',
            'two-layer', 'vanilla', 'lstm') for rule in ('es', 'd_rtrl'))])
@pytest.mark.usefixtures('compiled_quickly')
def test_the_budget_holds(monkeypatch, name, rule):
    """Many windows of a large batch: temporary memory beside a copy of the inputs of all steps.

    And no estimate that is far too high: windows would be short for nothing.
    """
    monkeypatch.setattr(harness, 'BATCH', 64)
    monkeypatch.setattr(plan, 'WIDE', math.inf)     # upstream's step would be as fast
    budget = 2 ** 20
    with traceops.configured(memory_budget=budget, carry_trace=rule == 'es'):
        run = start(traceops.compile, NETS[name], rule, 400)
    temporary = compiled(run.grad).memory_analysis().temp_size_in_bytes
    assert int(run.inner._last_call[1].split()[0]) <= 100       # steps per window
    assert budget / 4 <= temporary <= budget + run.x.nbytes + run.y.nbytes


@pytest.mark.cpu('programs for a GPU have a workspace of 32 MiB, beside which nothing is seen')
@pytest.mark.parametrize('rule, neurons, budget', [('es', 320, 1.5), ('d_rtrl', 112, 1.8)])
@pytest.mark.usefixtures('compiled_quickly')
def test_the_budget_holds_gradients_and_traces(monkeypatch, rule, neurons, budget):
    """What a window needs however long it is, here half of the budget, is part of it."""
    monkeypatch.setattr(nets, 'N', neurons)
    monkeypatch.setattr(harness, 'BATCH', 8)
    monkeypatch.setattr(plan, 'WIDE', math.inf)
    budget = int(budget * 2 ** 20)
    with traceops.configured(memory_budget=budget):
        run = start(traceops.compile, NETS['lif'], rule, 400)
    temporary = compiled(run.grad).memory_analysis().temp_size_in_bytes
    assert int(run.inner._last_call[1].split()[0]) <= 100       # steps per window
    assert budget / 2 <= temporary <= budget + run.x.nbytes + run.y.nbytes, temporary / budget
    assert 'MiB of gradients and traces' in str(traceops.explain(run.learner))


def products_in_loops(jaxpr, inside=False):
    found = []
    for eqn in jaxpr.eqns:
        # braintrace's own product, until it is lowered
        product = eqn.primitive.name in ('dot_general', 'etp_mm')
        found += [eqn] if inside and product else []
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                found += products_in_loops(inner, inside or eqn.primitive.name == 'scan')
    return found


@pytest.mark.parametrize('rule', ['D_RTRL', 'ES_D_RTRL'])
def test_the_product_of_a_readout_leaves_the_loop(rule):
    """One product a step is left, the recurrent one: as the benchmarks have it, with a readout."""
    case = Case('', 'lif', rule, 16, None, batch=4, steps=10)
    inputs = measure.data(case)
    call = measure.online(measure.of_case(case), traceops.compile)
    function, states = measure.pure(call, *inputs)
    [product] = products_in_loops(jax.make_jaxpr(function)(states, *inputs).jaxpr)
    assert product.invars[0].aval.shape == (4, 50 + 16)
    simulate, states = measure.pure(measure.simulation(measure.of_case(case)), *inputs)
    assert len(products_in_loops(jax.make_jaxpr(simulate)(states, *inputs).jaxpr)) == 2
