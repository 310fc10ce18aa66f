# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Structure, dtype and weak type of all that a call returns and leaves, as upstream has them."""

import warnings

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity.harness import RULES, Run, both
from tests.parity.nets import NETS, Net, Vanilla

pytestmark = pytest.mark.usefixtures('compiled_quickly')


class Counting(Vanilla):
    """States that begin as numbers of Python: one becomes a float, one stays weak."""

    def make(self):
        super().make()
        self.time, self.count = brainstate.ShortTermState(0), brainstate.ShortTermState(0.)

    def op(self, x, h):
        self.time.value, self.count.value = self.time.value + 0.5, self.count.value + 1
        return super().op(x, h) * jnp.cos(self.time.value)


class Narrowing(Counting):
    """A state that is of another type after a step: no loop can carry it."""

    def make(self):
        super().make()
        self.time.value = jnp.float32(0.)

    def op(self, x, h):
        out = super().op(x, h)
        self.time.value = jnp.asarray(self.time.value, jnp.bfloat16)
        return out


MADE = {**NETS, 'counting': Net(Counting), 'narrowing': Net(Narrowing)}


def start(compiler, name, rule, inputs, weights=None, vmap=False, steps=6):
    brainstate.random.seed(0)
    model = MADE[name].make()
    for state in model.states(brainstate.ParamState).values() if weights is not None else ():
        state.value = jax.tree.map(lambda a: a.astype(weights), state.value)
    x = MADE[name].inputs(steps, 4)
    x = x if inputs is None else x.astype(inputs)
    y = jnp.asarray(np.random.RandomState(5).randn(steps, 4, 2), jnp.float32)
    cls, more = RULES[rule]
    return Run(compiler(model, cls, x[0], batch_size=4, vmap=vmap, **more), model, x, y)


def pair(*args, **settings):
    with traceops.configured(window=3):
        return (start(braintrace.compile, *args, **settings),
                start(traceops.compile, *args, **settings))


def auxiliary(run):
    def step(x, y):
        return run.loss(x, y), {'x': x, 'number': 1., 'count': 3}
    return run.learner.etrace_grad(run.x, run.y, step_fn=step, has_aux=True, return_value=True,
                                   loss_output='scalar')


def single(run):
    return run.learner(run.x[0]), brainstate.transform.grad(
        lambda: run.loss(run.x[1], run.y[1]), run.inner.param_states)()


@traceops.accelerate
def loop(run):
    weights = run.inner.param_states

    def step(total, now):
        grads, loss = brainstate.transform.grad(
            lambda: run.loss(*now), weights, return_value=True)()
        return jax.tree.map(jnp.add, total, grads), loss
    zeros = {k: jax.tree.map(jnp.zeros_like, w.value) for k, w in weights.items()}
    return brainstate.transform.scan(step, zeros, (run.x, run.y))


CALLS = {'grad': Run.eager_grad, 'aux': auxiliary, 'single': single, 'loop': loop,
         'evolve': lambda run: run.learner.etrace_evolve(run.x, return_outputs=True)}


def outcome(call):
    """What a call returns and leaves; or the error that it raises."""
    def attempt(run):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                return brainstate.transform.jit(lambda: call(run))(), run.states()
            except Exception as err:
                return err
    return attempt


def kind(a):
    return jnp.result_type(a), jnp.shape(a), bool(getattr(a, 'weak_type', False))


def check(runs, call, tolerance):
    want, got = both(*runs, outcome(call))
    if isinstance(want, Exception):
        assert (type(got), str(got)) == (type(want), str(want))
        return 'error'
    assert not isinstance(got, Exception), got
    found = [dict(jax.tree_util.tree_leaves_with_path(a)) for a in (want, got)]
    assert [*found[0]] == [*found[1]]
    for path, a in found[0].items():
        b = found[1][path]
        assert kind(a) == kind(b), jax.tree_util.keystr(path)
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(a), 1e-3)
    assert any(np.linalg.norm(np.asarray(a, float)) > 0 for a in jax.tree.leaves(want[0]))
    return 'same'


SEEN = [('gru', 'd_rtrl', 'grad', 'bfloat16', False), ('gru', 'es', 'grad', 'float16', True),
        ('gru', 'es', 'loop', 'bfloat16', False), ('gru', 'd_rtrl', 'aux', 'bool', False),
        ('vanilla', 'd_rtrl', 'evolve', 'bfloat16', False),
        ('counting', 'd_rtrl', 'grad', None, False), ('counting', 'es', 'loop', None, False)]
MORE = [*((name, rule, call, inputs, vmap) for name in ('gru', 'vanilla')
          for rule in ('d_rtrl', 'es') for call in CALLS
          for inputs in ('bfloat16', 'float16', 'bool', 'int32') for vmap in (False, True)),
        *((name, 'd_rtrl', 'grad', 'bfloat16', False) for name in (
            'conv', 'lora', 'sparse', 'grouped', 'einsum', 'plain', 'bypass')),
        ('gru', 'eprop', 'grad', 'bfloat16', False), ('counting', 'd_rtrl', 'evolve', None, True),
        ('embedding', 'd_rtrl', 'aux', None, False), ('alif', 'es', 'loop', None, False)]


@pytest.mark.parametrize('name, rule, call, inputs, vmap', [
    *SEEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in SEEN)])
def test_inputs_of_every_kind(name, rule, call, inputs, vmap):
    runs = pair(name, rule, inputs, vmap=vmap)
    low = inputs in ('bfloat16', 'float16')
    assert check(runs, CALLS[call], 2e-2 if low else 1e-5) == 'same'
    if call in ('grad', 'aux'):
        assert runs[1].inner._last_call[0] == 'window'


@pytest.mark.parametrize('name, rule, call, inputs', [
    ('vanilla', 'd_rtrl', 'grad', None), ('narrowing', 'd_rtrl', 'grad', 'weights alone'),
    pytest.param('gru', 'd_rtrl', 'grad', 'bfloat16', marks=pytest.mark.slow),
    pytest.param('gru', 'es', 'loop', 'bfloat16', marks=pytest.mark.slow)])
def test_what_upstream_cannot_add_up(name, rule, call, inputs):
    """A hidden state, a gradient or another state that changes its type: upstream's error."""
    weights = None if inputs == 'weights alone' else 'bfloat16'
    runs = pair(name, rule, inputs if weights else None, weights)
    assert check(runs, CALLS[call], 0.) == 'error'


@pytest.mark.parametrize('name, rule, call, inputs, precision', [
    ('gru', 'd_rtrl', 'grad', 'float32', 64), ('alif', 'es', 'grad', None, 32),
    *(pytest.param(*case, precision, marks=pytest.mark.slow) for case in (
        ('gru', 'd_rtrl', 'grad', 'float32'), ('gru', 'es', 'loop', None),
        ('alif', 'es', 'grad', None)) for precision in (32, 64))])
def test_double_precision_enabled(name, rule, call, inputs, precision):
    """Weak weights of either precision, which the float32 mask of the mean narrows."""
    brainstate.environ.set(precision=precision)
    jax.config.update('jax_enable_x64', True)
    try:
        said = check(pair(name, rule, inputs), CALLS[call], 1e-5)
        assert said == 'same' or precision == 32    # where upstream's sum may change its type
    finally:
        brainstate.environ.set(precision=32)
        jax.config.update('jax_enable_x64', False)


def test_sequences_of_a_weak_type():
    runs = pair('vanilla', 'd_rtrl', None)
    for run in runs:
        run.x = jnp.full(run.x.shape, 0.5)
        assert run.x.weak_type
    assert check(runs, auxiliary, 1e-5) == 'same'
