# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A call outside jit is traced each time, and compiled once."""

import copy
import pickle

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.parity.harness import added_up, assert_close, start
from tests.parity.nets import NETS
from traceops.compiler.outside_jit import Programs, key_of

pytestmark = pytest.mark.usefixtures('compiled_quickly')

STEPS = 7
a = jnp.arange(6., dtype=jnp.float32)


def scanned(body):
    return lambda: jax.lax.scan(body, a, a)


def of(function):
    return key_of(jax.make_jaxpr(function)().jaxpr)


PROGRAMS = {
    'add': lambda: a + 1., 'another number': lambda: a + 2., 'the same twice': lambda: a + a,
    'two arrays': lambda: a + jnp.asarray(np.arange(6.), jnp.float32), 'an integer': lambda: a * 2,
    'power': lambda: a ** 2, 'cube': lambda: a ** 3, 'sum': lambda: a.sum(),
    'double': lambda: jax.lax.reduce_precision(a, 8, 7), 'loop': scanned(lambda c, x: (c + x, c)),
    'loop, other result': scanned(lambda c, x: (c + x, x)),
    'branch': lambda: jax.lax.cond(a[0] > 0, lambda: a, lambda: -a),
    'branch, turned': lambda: jax.lax.cond(a[0] > 0, lambda: -a, lambda: a),
    'relu': lambda: jax.nn.relu(a), 'random': lambda: jax.random.normal(jax.random.key(0), (3,)),
    'another key': lambda: jax.random.normal(jax.random.key(1), (3,)),
}


def test_programs_are_equal_that_compute_the_same_and_no_others():
    keys = {name: (of(fn), of(fn)) for name, fn in PROGRAMS.items()}
    for name, (first, again) in keys.items():
        assert first is not None and first == again, name
    assert len({first for first, _ in keys.values()}) == len(PROGRAMS)


def test_what_nobody_can_compare_is_equal_to_nothing():
    def called():
        jax.debug.callback(lambda x: None, a[0])
        return a
    assert of(called) is None


def compilations(call):
    """How often XLA compiles in a call."""
    seen = []

    def listen(name, seconds, **more):
        seen.append(name)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return sum('backend_compile' in name for name in seen)


def gradient(run):
    return run.eager_grad()


def evolve(run):
    return run.learner.etrace_evolve(run.x, return_outputs=True)


@pytest.mark.parametrize('way', [gradient, added_up, evolve])
def test_a_third_call_compiles_nothing_and_returns_what_one_under_jit_does(way):
    with traceops.enabled(window=STEPS):
        run = start(traceops.compile, NETS['lif'], 'd_rtrl', STEPS)
        like = start(traceops.compile, NETS['lif'], 'd_rtrl', STEPS)
        for _ in range(2):              # states take the types that a call leaves
            way(run), brainstate.transform.jit(lambda: way(like))()
        results = []
        assert compilations(lambda: results.append(way(run))) == 0
        want = brainstate.transform.jit(lambda: way(like))()
    assert_close(want, results[0], 1e-5, nonzero=True)
    assert_close(like.states(), run.states(), 1e-5)


def test_a_call_computes_what_its_step_says_now():
    factor, traced = [1.], []

    def call(run):
        def loss(x, y):
            traced.append(factor[0])
            return factor[0] * run.loss(x, y)
        return run.learner.etrace_grad(run.x, run.y, step_fn=loss)
    run, like = (start(traceops.compile, NETS['vanilla'], 'es', STEPS) for _ in range(2))
    for _ in range(3):
        call(run), call(like)
    once = call(like)
    factor[0], before = 3., len(traced)
    thrice = call(run)
    assert traced[before:] and set(traced[before:]) == {3.}
    assert_close(jax.tree.map(lambda g: 3. * g, once), thrice, 1e-5, nonzero=True)


def test_programs_are_not_copied():
    programs = Programs()
    assert_close([a + 1.], [programs.call(lambda: a + 1.)], 0.)
    for other in (copy.deepcopy(programs), pickle.loads(pickle.dumps(programs))):
        assert isinstance(other, Programs) and other is not programs


def test_only_the_last_programs_are_kept():
    programs = Programs()
    for i in range(20):
        programs.call(lambda i=i: a[:1 + i % 6] + float(i))
    assert compilations(lambda: programs.call(lambda: a[:2] + 19.)) == 0
    assert compilations(lambda: programs.call(lambda: a[:1] + 0.)) > 0
