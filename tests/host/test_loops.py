# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What is said of loops, who is reached, and that nothing stays behind."""

import collections
import json
import re

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity.test_loops import Task, add, fates, logged, tutorial
from traceops.benchmarks import measure
from traceops.host import deferred, plan


@pytest.fixture(autouse=True)
def however_short(monkeypatch):
    """Loops of few steps are deferred as well (of ES-D-RTRL, upstream's way is as fast)."""
    monkeypatch.setattr(plan, 'SHORT', 0)


def test_undo_leaves_the_loop_as_it_was():
    before = jax.lax.scan
    with traceops.enabled():
        traceops.install()
        assert jax.lax.scan is not before
    assert jax.lax.scan is not before
    traceops.uninstall()
    assert jax.lax.scan is before


def test_other_loops_are_the_originals():
    """No learner in it: the body is the user's, and the result the same."""
    def body(c, x):
        return c + x, c * x
    xs = jnp.arange(5.)
    want = jax.lax.scan(body, 0., xs)
    task = Task('vanilla', 'd_rtrl')
    with traceops.enabled():
        task = Task('vanilla', 'd_rtrl').begin()
        got = jax.lax.scan(body, 0., xs)
        counted = jax.lax.scan(lambda c, _: (c + 1, None), 0, None, length=3)[0]
        with pytest.raises(TypeError):
            jax.lax.scan(lambda c, x: (jnp.stack([c, c]), None), 0., xs)
    assert task and counted == 3
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_explain_of_a_function_that_waits():
    def train_step(inputs, targets):
        task = Task('vanilla', 'd_rtrl').begin()

        def step(total, slices):
            grads, loss, _ = task.grad(*slices)
            return add(total, grads), loss
        return brainstate.transform.scan(step, task.zeros(), (inputs, targets))

    task = Task('vanilla', 'd_rtrl')
    found = traceops.explain(train_step, task.x, task.y)
    [loop] = found.loops
    assert loop.deferred == ('D_RTRL of Vanilla',) and loop.window == loop.steps == 7
    assert 'test_loops.py' in loop.where and 'train_step' in loop.where
    assert 'once, after the loop' in str(found)
    assert json.loads(json.dumps(found.to_dict()))['loops'][0]['steps'] == 7
    assert not traceops.installed()


def test_explain_names_the_operation_that_is_in_the_way():
    found = traceops.explain(brainstate.transform.jit(
        lambda: logged(Task('vanilla', 'es', vmap=False))))
    [loop] = found.loops
    [(learner, reason)] = loop.kept
    assert reason.startswith('gradient of ') and ('`integer_pow`' in reason or '`square`' in reason)
    assert 'at every step' in str(found)
    assert loop in traceops.explain().loops


def test_steps_of_a_loop_are_not_listed_as_steps_by_hand():
    def train(by_hand):
        task = Task('vanilla', 'd_rtrl', vmap=False).begin()
        if by_hand:
            task.run(task.x[0])
        looked = brainstate.transform.for_loop(lambda x: task.run(x), task.x)
        return looked, tutorial(task)

    found = traceops.explain(lambda: train(False))
    assert len(found.loops) == 2 and not found.calls
    assert [name for name, _ in found.loops[0].forward] == list(found.loops[1].deferred)
    assert 'none is taken' in str(found)
    (call,) = traceops.explain(lambda: train(True)).calls
    assert call.what == 'a step by hand' and call in traceops.explain().calls


def test_explain_without_a_loop():
    assert 'learner was seen at work' in str(traceops.explain(lambda x: x + 1., 2.))
    with pytest.raises(TypeError, match='function and its example arguments'):
        traceops.explain(3)


def test_accelerate_reaches_what_it_decorates():
    @traceops.accelerate(window=3)
    @brainstate.transform.jit
    def train():
        return tutorial(Task('vanilla', 'd_rtrl'))[0]

    with fates() as seen:
        want = tutorial(Task('vanilla', 'd_rtrl'))[0]
        got = train()
        tutorial(Task('vanilla', 'd_rtrl'))
    assert [one.window for one in seen] == [3]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), want, got)
    with pytest.raises(TypeError, match='accelerate'):
        traceops.accelerate(3)


def test_what_fails_is_run_as_it_was_written(monkeypatch):
    """The automatic choice never fails, and says why it was not made."""
    def broken(*args):
        raise RuntimeError('no such window')
    monkeypatch.setattr(deferred, 'choose_window', broken)
    want = tutorial(Task('vanilla', 'd_rtrl'))[0]
    with fates() as seen, traceops.enabled():
        got = tutorial(Task('vanilla', 'd_rtrl'))[0]
    assert 'no such window' in seen[0].kept[0][1]
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_a_step_by_hand_is_upstreams(float64):
    """Outside of any loop: same gradients, same traces."""
    def run():
        task = Task('vanilla', 'd_rtrl', vmap=False).begin()
        out = [task.grad(x, y)[0] for x, y in zip(task.x, task.y, strict=True)]
        return out, task.traces()
    want = run()
    with traceops.enabled():
        got = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), want, got)


@pytest.mark.parametrize('vmap, rule', [
    (True, 'd_rtrl'), (False, 'es'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 'd_rtrl'), (True, 'es')))])
def test_a_step_by_hand_compiles_to_upstreams_program(rule, vmap):
    """Recognisable in the jaxpr, and not an operation more than upstream's on a CPU."""
    def compiled():
        task = Task('vanilla', rule, vmap=vmap).begin()
        step, states = measure.pure(task.grad, task.x[0], task.y[0])
        text = jax.jit(step).lower(states, task.x[0], task.y[0]).compile().as_text()
        names = {e.primitive.name
                 for e in jax.make_jaxpr(step)(states, task.x[0], task.y[0]).jaxpr.eqns}
        return collections.Counter(re.findall(r' = \S+ ([\w-]+)\(', text)), names

    want, before = compiled()
    with traceops.enabled():
        got, names = compiled()
    assert {'etp_step_update', 'etp_step_gradient'} <= names - before
    assert got['dot'] + got['fusion'] > 3 and not got - want, got - want


def test_a_factorised_learner_keeps_its_loop_of_few_steps(monkeypatch):
    """Upstream's step is as fast there; the reason is said."""
    monkeypatch.setattr(plan, 'SHORT', 8)

    def train_step(inputs, targets):
        task = Task('vanilla', 'es', vmap=False).begin()

        def step(total, slices):
            grads, loss, _ = task.grad(*slices)
            return add(total, grads), loss
        return brainstate.transform.scan(step, task.zeros(), (inputs, targets))

    task = Task('vanilla', 'es', vmap=False)
    [loop] = traceops.explain(train_step, task.x, task.y).loops
    assert not loop.deferred and 'less than 8 of a small net' in loop.kept[0][1]


@pytest.mark.parametrize('wide, waits', [(0, False), (6, True)])
def test_a_factorised_learner_keeps_its_loop_of_a_large_batch(monkeypatch, wide, waits):
    """One that records much more than the weights are."""
    monkeypatch.setattr(plan, 'WIDE', wide)
    [loop] = traceops.explain(
        lambda: tutorial(Task('vanilla', 'es', vmap=False))).loops
    assert bool(loop.deferred) is waits
    assert waits or 'a batch so large' in loop.kept[0][1]
