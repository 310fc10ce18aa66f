# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a loop does beside its gradients happens as often as upstream, in order, with its values."""

import collections

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import traceops
from tests.parity.harness import assert_close
from tests.parity.test_loops import Task, add, fates, however_short  # noqa: F401  (a fixture)
from traceops.host import sequence

T = 7


class Log:
    """What effects saw: those in order, and those in any."""

    def __init__(self):
        self.ordered, self.any, self.calls = [], collections.Counter(), 0

    def write(self, name, value):
        self.ordered.append((name, np.round(np.float64(value), 6).tolist()))

    def count(self, name, value):
        self.any[name, np.round(np.float64(value), 6).item()] += 1

    def clock(self):
        """Another number at every call."""
        self.calls += 1
        return np.float64(self.calls)

    def read(self):
        jax.effects_barrier()
        return self.ordered, self.any, self.calls


def number():
    return jax.ShapeDtypeStruct((), jnp.result_type(float))


def in_loss(log, task, x, y):
    """A loss with effects of every kind; one of them gives it a factor."""
    loss, out = task.loss(x, y)
    jax.debug.callback(lambda v: log.write('loss', v), loss, ordered=True)
    jax.debug.callback(lambda v: log.count('loss', v), loss)
    brainstate.transform.jit_error_if(loss > 1e9, 'too large')
    now = io_callback(log.clock, number(), ordered=True)
    return loss * (1. + now), out


def in_body(log, x, loss):
    """Results that nobody reads, in branches and in loops of their own."""
    io_callback(lambda v: log.write('mean', v), None, x.mean(), ordered=True)
    jax.lax.cond(loss > 0., lambda: jax.debug.callback(
        lambda v: log.count('in a branch', v), x.sum()), lambda: None)
    jax.lax.scan(lambda c, a: (c, io_callback(
        lambda v: (log.count('inside', v), v)[1], number(), a)), 0., x.reshape(-1)[:2])


def loop(task, log, progress=None):
    def step(total, slices):
        x, y = slices
        grads, loss = brainstate.transform.grad(
            lambda: in_loss(log, task, x, y)[0], task.weights, return_value=True)()
        in_body(log, x, loss)
        return add(total, grads), loss
    return brainstate.transform.scan(step, task.zeros(), (task.x, task.y), pbar=progress)


def both(run, **settings):
    """What ``run(log)`` returns, and what its effects saw, upstream and here."""
    log = Log()
    want = jax.block_until_ready(run(log)), log.read()
    log = Log()
    with fates() as seen, traceops.enabled(**settings):
        got = jax.block_until_ready(run(log)), log.read()
    assert len(want[1][0]) >= T and want[1][1]
    assert want[1] == got[1]
    return want[0], got[0], seen


@pytest.mark.parametrize('rule, vmap, window', [
    ('d_rtrl', False, 3), ('es', False, None),
    pytest.param('d_rtrl', True, 2, marks=pytest.mark.slow)])
def test_a_loop_that_waits(float64, rule, vmap, window):
    def run(log):
        task = Task('gru', rule, vmap=vmap).begin()
        return brainstate.transform.jit(lambda: loop(task, log, progress=2))()

    want, got, [one] = both(run, window=window)
    assert one.deferred and one.window == (window or T)
    assert_close(want, got, 1e-10, nonzero=True)


@pytest.mark.parametrize('jitted', [False, True])
def test_what_ran_before_an_error_ran_once(compiled_quickly, jitted):
    """Outside jit too, where the error is there while the loop is looked at."""
    def run():
        task, log = Task('gru', 'd_rtrl', vmap=False).begin(), []

        def see(i):
            log.append(int(i))
            if i == 3:
                raise ValueError('stop')

        def step(total, slices):
            i, x, y = slices
            grads, loss, _ = task.grad(x, y)
            jax.debug.callback(see, i, ordered=True)
            return add(total, grads), None

        def training():
            return brainstate.transform.scan(
                step, task.zeros(), (jnp.arange(len(task.x)), task.x, task.y))[0]
        with pytest.raises(Exception, match='stop'):
            jax.block_until_ready((brainstate.transform.jit(training) if jitted else training)())
            jax.effects_barrier()
        return log
    assert run() == [0, 1, 2, 3]
    with fates() as seen, traceops.enabled():
        assert run() == [0, 1, 2, 3]
    assert seen[0].deferred and not seen[0].kept


def test_an_error_in_a_loop_that_waits(compiled_quickly):
    def run():
        task = Task('gru', 'd_rtrl', vmap=False).begin()

        def step(total, slices):
            grads, loss, _ = task.grad(*slices)
            brainstate.transform.jit_error_if(loss > 0., 'a loss of {}', loss)
            return add(total, grads), None
        jax.block_until_ready(brainstate.transform.jit(lambda: brainstate.transform.scan(
            step, task.zeros(), (task.x, task.y)))())
        jax.effects_barrier()

    with fates() as seen, traceops.enabled(), pytest.raises(Exception, match='a loss of'):
        run()
    assert seen[0].deferred


READERS = {
    'gradient': (lambda grads, total: grads,
                 '`io_callback` reads it inside the loop'),
    'sum': (lambda grads, total: total, '`io_callback` reads the sum inside the loop'),
}


@pytest.mark.parametrize('what', READERS)
def test_an_effect_that_reads_what_would_wait(compiled_quickly, what):
    """The loop runs as it was written, and the effect is named."""
    read, reason = READERS[what]

    def train(log):
        task = Task('gru', 'd_rtrl', vmap=False).begin()

        def step(total, slices):
            grads, loss, _ = task.grad(*slices)
            io_callback(lambda *v: log.append([a.tolist() for a in v]), None,
                        *jax.tree.leaves(read(grads, total)), ordered=True)
            return add(total, grads), None
        return brainstate.transform.scan(step, task.zeros(), (task.x, task.y))

    want, got = [], []
    brainstate.transform.jit(lambda: train(want))()
    with fates() as seen, traceops.enabled():
        brainstate.transform.jit(lambda: train(got))()
    jax.effects_barrier()
    assert want == got and len(got) == T
    assert any(reason in why for _, why in seen[0].kept), seen[0].kept


def with_ref(task):
    """The loss is added up in a reference."""
    def train(x, y):
        total = jax.new_ref(jnp.zeros(()))

        def step(grads, slices):
            new, loss, _ = task.grad(*slices)
            total[...] += loss
            return add(grads, new), None
        return brainstate.transform.scan(step, task.zeros(), (x, y))[0], total[...]
    return brainstate.transform.jit(train)(task.x, task.y)


def test_a_loop_with_a_reference_stays(compiled_quickly):
    want = with_ref(Task('gru', 'd_rtrl', vmap=False).begin())
    with fates() as seen, traceops.enabled():
        got = with_ref(Task('gru', 'd_rtrl', vmap=False).begin())
    assert any('an effect that is the original loop' in why for _, why in seen[0].kept)
    assert_close(want, got, 0., nonzero=True)


WINDOWS = {'one': {}, 'of 3': {'window': 3}, 'simulated twice': {'window': 3, 'carry_trace': False},
           'recorded': {'carry_trace': False}}


@pytest.mark.parametrize('name', WINDOWS)
def test_a_sequence(float64, name, monkeypatch):
    """``etrace_grad``: a window that is simulated again does nothing again."""
    if name == 'recorded':          # as of a longer sequence, within the budget
        monkeypatch.setattr(sequence, 'choose_window', lambda *args: 3)

    def run(log):
        task = Task('gru', 'd_rtrl', vmap=False).begin()

        def loss(x, y):
            value, _ = in_loss(log, task, x, y)
            in_body(log, x, value)
            return value
        out = brainstate.transform.jit(lambda: task.algo.etrace_grad(
            task.x, task.y, step_fn=loss, return_value=True))()
        if traceops.installed():
            said.append(task.algo._last_call)
        return out

    said = []
    want, got, _ = both(run, **WINDOWS[name])
    assert said[0][0] == 'window' and ('twice' in said[0][1]) == (name == 'simulated twice'), said
    assert said[0][1].startswith(f'{T if name == "one" else 3} steps')
    assert_close(want, got, 1e-10, nonzero=True)


def test_evolve(float64):
    def run(log):
        task = Task('gru', 'd_rtrl', vmap=False).begin()

        def forward(x):
            out = task.run(x)
            in_body(log, x, out.sum())
            now = io_callback(log.clock, number(), ordered=True)
            return out * now
        return brainstate.transform.jit(lambda: task.algo.etrace_evolve(
            task.x, step_fn=forward, return_outputs=True))(), task.traces()

    want, got, _ = both(run, window=3)
    assert_close(want, got, 1e-10, nonzero=True)


def test_a_sequence_with_a_reference_is_upstreams(compiled_quickly):
    def run():
        task = Task('gru', 'd_rtrl', vmap=False).begin()

        def train(x, y):
            total = jax.new_ref(jnp.zeros(()))

            def loss(x, y):
                value = task.loss(x, y)[0]
                total[...] += jax.lax.stop_gradient(value)
                return value
            return task.algo.etrace_grad(x, y, step_fn=loss), total[...]
        out = brainstate.transform.jit(train)(task.x, task.y)
        return out, getattr(task.algo, '_last_call', None)

    want, _ = run()
    with traceops.enabled():
        got, last = run()
    assert_close(want, got, 0., nonzero=True)
    assert last[0] == 'per-step' and 'an effect' in last[1]
