# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Every reason comes with what to write instead, and explain prints both."""

import ast
import copy
import json
import pathlib
import string

import brainstate
import jax
import jax.numpy as jnp
import pytest

import traceops
from tests.parity.harness import start
from tests.parity.nets import NETS
from tests.parity.test_loops import Task, add
from traceops import reasons
from traceops.reasons import Kind, Reason, instead_of

KINDS = {name: kind for name, kind in vars(reasons).items() if isinstance(kind, Kind)}
SOURCES = {path: path.read_text() for path in pathlib.Path(traceops.__file__).parent.rglob('*.py')
           if path != pathlib.Path(reasons.__file__)}
#: What takes a reason: a text in place of one would have no advice.
TAKES = ('_Refused', 'CarryTypeError', 'UnknownEffectError', 'as_upstream', 'Reason')


def fields(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize('name', KINDS)
def test_every_kind_has_advice_and_is_given_somewhere(name):
    kind = KINDS[name]
    assert kind.instead.strip() and '\n' not in kind.instead
    assert fields(kind.instead) <= fields(kind.text)
    assert any(f'reasons.{name}' in text for text in SOURCES.values())


def test_no_reason_is_made_elsewhere():
    calls = [(path.name, node) for path, text in SOURCES.items()
             for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
             and getattr(node.func, 'id', getattr(node.func, 'attr', '')) in TAKES]
    assert len(calls) > 10
    assert not [(name, node.lineno) for name, node in calls if any(
        isinstance(arg, (ast.Constant, ast.JoinedStr)) for arg in node.args)]


def test_a_reason_is_a_text():
    one = reasons.INSIDE(name='cond')
    again = copy.deepcopy(one)
    assert json.loads(json.dumps(one)) == one == again == 'its step is inside a `cond`'
    assert again.instead == one.instead and instead_of('10 steps per window') == ''
    assert Reason('so it is').instead == ''


def loop(body):
    """A training function with a loop by hand, whose body is ``(task, total, x, y) -> ...``."""
    def train():
        task = Task('vanilla', 'd_rtrl', vmap=False).begin()
        return brainstate.transform.scan(
            lambda total, now: body(task, total, *now), task.zeros(), (task.x, task.y))
    return train


def clipped(task, total, x, y):
    grads = jax.tree.map(lambda g: jnp.clip(g, -1., 1.), task.grad(x, y)[0])
    return add(total, grads), None


def updated(task, total, x, y):
    for name, grad in task.grad(x, y)[0].items():
        task.weights[name].value = jax.tree.map(
            lambda w, g: w - 0.1 * g, task.weights[name].value, grad)
    return total, None


def branched(task, total, x, y):
    grads = brainstate.transform.cond(
        x.sum() > 0., lambda: task.grad(x, y)[0], lambda: task.zeros())
    return add(total, grads), None


def twice(task, total, x, y):
    task.run(x)
    return add(total, task.grad(x, y)[0]), None


@pytest.mark.parametrize('body, reason, instead', [
    (clipped, 'reads it inside the loop', 'do it with the sum, after the loop'),
    (updated, 'its weights change', 'update once after the loop'),
    (branched, 'its step is inside a `cond`', 'multiply the loss by 0'),
    (twice, 'it steps 2 times', 'one learner(x) in the body'),
    (lambda task, total, x, y: (task.grad(x, y)[0], None), 'nothing is added up',
     'total = jax.tree.map(jnp.add, total, grads)'),
    (lambda task, total, x, y: (total, task.grad(x, y)[0]), 'the loop returns it',
     'return the loss'),
], ids=['clipped', 'updated', 'branched', 'twice', 'replaced', 'returned'])
def test_a_loop_that_stays_says_what_to_write_instead(body, reason, instead):
    found = traceops.explain(loop(body))
    [(_, why)] = found.loops[0].kept
    assert reason in why and instead in why.instead
    lines = str(found).splitlines()
    [place] = [i for i, line in enumerate(lines) if line == f'- {why}']
    assert lines[place + 1] == f'  instead: {why.instead}'
    assert found.to_dict()['loops'][0]['instead'] == {why: why.instead}


def test_a_loop_of_one_step_is_told_of():
    def train():
        task = Task('vanilla', 'd_rtrl', vmap=False).begin()
        return brainstate.transform.for_loop(task.run, task.x[:1])
    found = traceops.explain(train)
    assert found.loops[0].kept == (('D_RTRL of Vanilla', 'a loop of one step'),)


def test_a_learner_says_that_its_loops_waited():
    """It was not unused; and its trace is what the loop works on."""
    made = []

    def train():
        task = Task('vanilla', 'd_rtrl', vmap=False).begin()
        made.append(task.algo)
        return brainstate.transform.scan(
            lambda total, now: (add(total, task.grad(*now)[0]), None), task.zeros(),
            (task.x, task.y))
    traceops.explain(train)
    said = str(traceops.explain(made[0]))
    assert {r.used for r in traceops.explain(made[0]).rows} == {'a loop by hand: window'}
    assert 'once, after the loop' in said and 'carry_trace=False)' not in said


def test_settings_that_do_not_act_are_not_named():
    factorised = start(traceops.compile, NETS['lif'], 'es', 9)
    assert 'carry_trace' not in str(traceops.explain(factorised.learner))
    declined = start(traceops.compile, NETS['lif'], 'd_rtrl', 3, trace_dtype='bfloat16')
    said = str(traceops.explain(declined.learner))
    assert 'instead: trace_dtype=None' in said and 'precision' not in said
