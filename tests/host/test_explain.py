# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""explain: one row per relation and group, the engine, and the reason."""

import functools
import gc
import json
import warnings
import weakref

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import pytest
import saiunit as u

import traceops
from tests.parity.harness import BATCH, start
from tests.parity.nets import NETS
from tests.parity.test_transformed import net
from traceops.host import explain, relations
from traceops.host.rule import Rule

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def test_a_window_learner():
    run = start(traceops.compile, NETS['alif'], 'd_rtrl', 5)
    run.grad()
    found = traceops.explain(run.learner)
    assert {r.used for r in found.rows} == {'etrace_grad: window'}
    assert [(r.parameter, r.states, r.engine, r.reason) for r in found.rows] == [
        ('linear.weight', 2, 'window', ''), ('readout.W', 1, 'window', '')]
    trace = run.learner.etrace_bwg.values()
    sizes = sum(a.nbytes for st in trace for a in st.value.values())
    assert sum(r.trace_bytes for r in found.rows) == sizes and found.saved_bytes == 0
    assert '5 steps per window' in str(found)
    assert json.loads(json.dumps(found.to_dict()))['rows'][0]['engine'] == 'window'


@pytest.mark.parametrize('rule, settings, bound', [
    ('es', {}, 'the cache, 16.00 MiB'),
    ('es', {'memory_budget': '8MiB'}, 'memory_budget, 8.00 MiB'),
    ('d_rtrl', {}, 'memory_budget, 256.00 MiB'),
    ('d_rtrl', {'two_phase': True}, 'memory_budget, 1024.00 MiB'), ('es', {'window': 3}, None)])
def test_what_bounds_a_window(rule, settings, bound):
    """Of ES-D-RTRL on a CPU the cache, if that is less; never where a trace is carried."""
    with traceops.configured(**{'two_phase': False, **settings}):
        run = start(traceops.compile, NETS['lif'], rule, 5)
    said = f'window: chosen within {bound};' if bound else 'window: 3;'
    assert said in str(traceops.explain(run.learner))


def test_what_is_not_kept_is_saved():
    with traceops.configured(carry_trace=False):
        run = start(traceops.compile, NETS['alif'], 'd_rtrl', 5)
    found = traceops.explain(run.learner)
    assert found.saved_bytes == sum(r.trace_bytes for r in found.rows) > 0


@pytest.mark.parametrize('settings, twice', [
    ({'window': 2}, True), ({'memory_budget': 1024}, True), ({}, False)])
def test_windows_that_are_simulated_twice(monkeypatch, settings, twice):
    """Without a trace; where they were asked for, or memory for the states of all steps is not."""
    monkeypatch.setattr(Rule, 'window_budget', lambda self, more=0: 1024)
    with traceops.configured(carry_trace=False, **settings):
        run = start(traceops.compile, NETS['alif'], 'd_rtrl', 7)
    run.grad()
    said = str(traceops.explain(run.learner))
    assert (', each simulated twice' in said) == twice and '7 steps per window' not in said


def test_gradients_that_are_summed_over_spikes(monkeypatch):
    """Large layers that spikes enter."""
    def noted(name, rule, **settings):
        with traceops.configured(**settings):
            made = start(traceops.compile, NETS[name], rule, 5).learner
        return [n for n in traceops.explain(made).notes if n.startswith('spikes enter')]
    assert not noted('lif', 'es')
    monkeypatch.setattr(relations, '_LARGE', 50)
    assert 'linear.weight:' in noted('lif', 'es')[0]
    assert noted('lif', 'd_rtrl', carry_trace=False) == noted('lif', 'es')
    assert noted('lif', 'd_rtrl') == noted('lif', 'es') and not noted('gru', 'es')


@pytest.mark.parametrize('make, engine, reason', [
    (lambda: start(braintrace.compile, NETS['lif'], 'd_rtrl', 3), 'upstream', 'made before'),
    (lambda: start(traceops.compile, NETS['shared-axis'], 'd_rtrl', 3), 'upstream', 'shares axis'),
    (lambda: start(traceops.compile, NETS['lif'], 'eprop', 3, vjp_method='multi-step'),
     'upstream', 'multi-step'),
    (lambda: start(traceops.compile, NETS['lif'], 'd_rtrl', 3, trace_dtype='bfloat16'),
     'upstream', 'rounds the trace'),
    (lambda: start(traceops.compile, NETS['conv'], 'd_rtrl', 3), 'window', 'no closed form'),
], ids=['upstream', 'shared-axis', 'multi-step', 'trace_dtype', 'conv'])
def test_every_refusal_has_a_reason(make, engine, reason):
    row = traceops.explain(make().learner).rows[0]
    assert row.engine == engine and reason in row.reason and row.instead


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
    assert row.engine == 'per-step' and row.instead.startswith('traceops.compile(')
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


def made_and_used(then, vmap=False, rule='d_rtrl', net='lif'):
    """A training step that makes its learner, as most people write it."""
    made = []

    def train_step():
        made.append(start(traceops.compile, NETS[net], rule, 5, vmap))
        return then(made[-1])
    return train_step, made


def evolve_and_learn(run):
    run.learner.etrace_evolve(run.x)
    return run.eager_grad()


def test_a_function_that_makes_its_learner():
    """Every call with its place; the learner itself can be asked when the function is over."""
    train_step, made = made_and_used(evolve_and_learn, vmap=True)
    found = traceops.explain(train_step)
    assert [(c.what, c.steps, c.engine) for c in found.calls] == [
        ('etrace_evolve', 5, 'window'), ('etrace_grad', 5, 'window')]
    assert all('test_explain.py' in c.where or 'harness.py' in c.where for c in found.calls)
    assert set(found.calls) <= set(traceops.explain().calls)
    said = traceops.explain(made[0].learner)
    assert said.rows[0].used == 'etrace_evolve: window; etrace_grad: window'
    assert said.rows[0].trace_bytes == 4 * (9 * 6 + 6) * 4          # of four lanes


def explained_outside(then):
    """A training step that resets a learner which was made before."""
    run = start(traceops.compile, NETS['lif'], 'd_rtrl', 5)

    def train_step():
        brainstate.nn.reset_all_states(run.learner, batch_size=BATCH)
        return then(run)
    traceops.explain(train_step)
    return run


@pytest.mark.parametrize('then, advised', [
    (lambda run: run.eager_grad(), True), (evolve_and_learn, False),
    (lambda run: [run.learner(run.x[0]), run.eager_grad()], False)])
def test_advice_only_where_it_is_safe(then, advised):
    """Without a trace the gradients are the same only where each call starts from zero."""
    run = explained_outside(then)
    assert ('carry_trace=False): the gradients are the same'
            in str(traceops.explain(run.learner))) == advised


def test_a_trace_that_its_program_ends_with(monkeypatch):
    """Of a learner made in the function that uses it; else it is said how to be without one."""
    def forms_it(run):
        return 'forms the one' in str(run) or 'is formed there' in str(run)
    monkeypatch.setattr(explain, '_LARGE_TRACE', 0)
    train_step, made = made_and_used(evolve_and_learn)
    traceops.explain(train_step)
    said = str(traceops.explain(made[0].learner))
    assert 'which no trace leaves' in said and not forms_it(said)
    run = explained_outside(evolve_and_learn)
    said = str(traceops.explain(run.learner))
    assert 'in the jitted function itself' in said and forms_it(said)


class Trainer:
    def __init__(self, net):
        self.run = start(traceops.compile, NETS[net], 'd_rtrl', 5)

    @brainstate.transform.jit(static_argnums=(0,), static_argnames=('how',))
    def train(self, x, how='mean'):
        loss = {'mean': jnp.mean, 'sum': jnp.sum}[how]
        return self.run.learner.etrace_grad(x, step_fn=lambda x: loss(self.run.learner(x)))


def test_methods_and_arguments_that_are_no_arrays():
    """A jitted method of a trainer, called before; a partial of it; an argument that is static."""
    trainer = Trainer('lif')
    trainer.train(trainer.run.x, how='sum')
    for found in (traceops.explain(trainer.train, trainer.run.x, how='sum'),
                  traceops.explain(functools.partial(trainer.train, how='sum'), trainer.run.x)):
        assert [c.what for c in found.calls] == ['etrace_grad'] and not found.notes
        assert 'in Trainer.train' in found.calls[0].where


def test_a_decorator_keeps_what_it_does():
    """Only ``jit`` is taken off: settings and the environment of a function stay."""
    made = []

    @traceops.accelerate(window=2)
    @brainstate.environ.context(dt=1. * u.ms)
    def train_step():
        made.append(start(braintrace.compile, NETS['lif'], 'd_rtrl', 5))
        return made[-1].eager_grad()
    brainstate.environ.pop('dt')
    found = traceops.explain(train_step)
    assert [c.reason.split(';')[0] for c in found.calls] == ['2 steps per window']


def test_functions_that_cannot_be_traced_list_what_was_seen():
    run = start(traceops.compile, NETS['lif'], 'd_rtrl', 5)
    step = brainstate.transform.jit(lambda x: run.learner(x).mean())

    def in_python(x):
        return [float(step(one)) for one in x]
    found = traceops.explain(in_python, run.x)
    assert 'needs the values of arrays' in found.notes[0] and 'in_python' in found.notes[0]
    assert 'test_explain.py' in found.notes[0] and found.calls == traceops.explain().calls
    step(run.x[0])
    found = traceops.explain(lambda x: step(x), run.x[0])
    assert 'were traced before' in str(found) and found.to_dict()['notes']


def test_several_steps_at_once_are_named_in_loops():
    def train():
        run = start(traceops.compile, NETS['vanilla'], 'd_rtrl', 6, vjp_method='multi-step')

        def step(total, x):
            grads = brainstate.transform.grad(
                lambda: run.learner(braintrace.MultiStepData(x)).sum(), run.inner.param_states)()
            return jax.tree.map(jnp.add, total, grads), None
        zeros = {k: jax.tree.map(jnp.zeros_like, w.value)
                 for k, w in run.inner.param_states.items()}
        run.learner(braintrace.MultiStepData(run.x))
        return brainstate.transform.scan(step, zeros, run.x.reshape(2, 3, *run.x.shape[1:]))
    found = traceops.explain(train)
    [(_, why)] = found.loops[0].kept
    assert 'several steps at once' in why and why.instead
    assert [(c.what, c.steps) for c in found.calls] == [('a step by hand', 6)]


def test_steps_by_hand_are_named():
    def by_hand(run):
        return brainstate.transform.grad(lambda: run.learner(run.x[0]).sum(),
                                         run.inner.param_states)()
    train_step, made = made_and_used(by_hand)
    found = traceops.explain(train_step)
    assert {(c.what, c.engine) for c in found.calls} == {('a step by hand', 'per-step')}
    assert 'learner.etrace_grad(xs, ys, step_fn=...)' in str(found)
    assert traceops.explain(made[0].learner).rows[0].used == 'a step by hand'
    assert 'GPU' not in str(found) and 'kernel' not in str(traceops.explain(made[0].learner))


def test_what_is_remembered_keeps_no_learner_alive():
    run = start(traceops.compile, NETS['lif'], 'd_rtrl', 5)
    run.learner(run.x[0])
    assert traceops.explain().calls
    alive = weakref.ref(run.learner)
    del run
    gc.collect()
    assert alive() is None


def test_no_warning_that_upstream_does_not_give():
    run = start(traceops.compile, net('normalised'), 'd_rtrl', 5, True)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*was decomposed')
        evolve_and_learn(run)
    row = traceops.explain(run.learner).rows[0]
    assert 'is transformed' in row.reason


def test_what_a_call_outside_jit_costs_is_said_after_the_second():
    run = start(traceops.compile, NETS['lif'], 'es', 9)

    def said():
        return [n for n in traceops.explain(run.learner).notes if 'outside jit' in n]

    def call():
        return run.learner.etrace_grad(run.x, step_fn=lambda x: (run.learner(x) ** 2).mean())
    brainstate.transform.jit(call)()
    call()
    assert not said()
    call()
    assert len(said()) == 1 and '2 calls' in said()[0] and 'brainstate.transform.jit' in said()[0]
