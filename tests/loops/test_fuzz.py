# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Loops that nobody chose: with a learner alive they are what they are without (hypothesis)."""

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental import io_callback

import traceops
from tests.parity.test_loops import Task, add, fates

ORIGINAL = jax.lax.scan

OPTIONS = st.fixed_dictionaries({
    'length': st.integers(0, 4), 'sliced': st.booleans(), 'reverse': st.booleans(),
    'unroll': st.sampled_from([1, 2, True, False]),
    'carry': st.lists(st.sampled_from(['number', 'array', 'key', 'raw', 'same', 'int']),
                      max_size=3, unique=True),
    'beside': st.lists(st.sampled_from(['print', 'ordered', 'result', 'unread', 'branch', 'ref',
                                        'python']), max_size=3, unique=True),
    'jitted': st.booleans()})


def carry_of(kinds):
    made = {'number': 1., 'array': np.ones(2, np.float32), 'key': jax.random.key(3),
            'raw': jax.random.PRNGKey(4), 'same': np.arange(2), 'int': np.int8(1)}
    return {kind: made[kind] for kind in kinds}


def turned(carry, x, noise):
    """A carry after a step, and an output."""
    new, out = dict(carry), x + noise
    for kind, value in carry.items():
        if kind in ('key', 'raw'):
            new[kind], sub = jax.random.split(value)
            out = out + jax.random.uniform(sub)
        elif kind == 'int':
            new[kind] = -value
        elif kind != 'same':
            new[kind] = value * 0.5 + jnp.sum(x)
    return new, out


class Effects:
    """What loops do beside computing, and what was seen of it."""

    def __init__(self):
        self.ordered, self.any, self.traced = [], [], []

    def of(self, kinds, level, x, ref):
        """Do it; a number that it makes."""
        noise = jnp.float32(0.)
        see = x.sum()
        if 'print' in kinds:
            jax.debug.callback(lambda v: self.any.append((level, float(v))), see)
        if 'branch' in kinds:
            jax.lax.cond(see > 1., lambda: jax.debug.callback(
                lambda v: self.any.append(('branch', float(v))), see), lambda: None)
        if 'ordered' in kinds:
            jax.debug.callback(lambda v: self.ordered.append((level, float(v))), see, ordered=True)
        if 'result' in kinds:
            noise = io_callback(lambda v: (self.ordered.append(float(v)), v)[1],
                                jax.ShapeDtypeStruct((), jnp.float32), see, ordered=True)
        if 'unread' in kinds:
            io_callback(lambda v: (self.any.append(float(v)), v)[1],
                        jax.ShapeDtypeStruct((), jnp.float32), see)
        if 'ref' in kinds:
            ref[...] += see
        if 'python' in kinds:
            noise = noise + len(self.traced)
        return noise

    def read(self):
        jax.effects_barrier()
        return self.ordered, sorted(map(str, self.any)), self.traced


def outcome(levels, inner=None):
    """Results, effects and traces of loops in loops; or the error."""
    seen = Effects()

    def loop(depth, ref):
        options = levels[depth]
        n = options['length']
        slices = (jnp.arange(n, dtype=jnp.float32), np.ones((n, 2), np.int32))

        def body(carry, x):
            seen.traced.append(depth)
            x = jnp.float32(1.) if x is None else x[0] + x[1].sum()
            new, out = turned(carry, x, seen.of(options['beside'], depth, x, ref))
            if depth + 1 < len(levels):
                return new, (out, loop(depth + 1, ref))
            return new, (out, inner() if inner is not None else ())

        return jax.lax.scan(
            body, carry_of(options['carry']), slices if options['sliced'] else None, length=n,
            reverse=options['reverse'], unroll=options['unroll'])

    def run():
        ref = jax.new_ref(jnp.float32(0.))
        return loop(0, ref), ref[...]

    try:
        jit = brainstate.transform.jit if inner is not None else jax.jit
        out = jit(run)() if inner is not None or levels[0]['jitted'] else run()
    except Exception as err:
        return type(err), str(err)[:200], seen.traced
    leaves, tree = jax.tree.flatten(out)
    return tree, [(type(a), jnp.result_type(a), getattr(a, 'weak_type', None),
                   str(jax.random.key_data(a) if jnp.issubdtype(
                       jnp.result_type(a), jax.dtypes.prng_key) else a)) for a in leaves], \
        seen.read()


@settings(max_examples=10, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
@given(levels=st.lists(OPTIONS, min_size=1, max_size=3))
def test_loops_without_a_step(compiled_quickly, levels):
    """Results, types, effects, their order and the number of traces: jax's own."""
    assert jax.lax.scan is ORIGINAL
    want = outcome(levels)
    with traceops.enabled():
        alive = braintrace.compile(braintrace.nn.GRUCell(2, 3), braintrace.D_RTRL, jnp.zeros(2))
        assert alive and jax.lax.scan is not ORIGINAL
        got = outcome(levels)
    assert want == got
    _errors.append(isinstance(want[0], type))


_errors: list[bool] = []


def test_most_of_them_run():
    """So that something was compared."""
    assert not _errors or sum(_errors) < len(_errors) / 2, _errors


@pytest.mark.parametrize('seed', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_loops_around_a_learners(compiled_quickly, seed):
    """The innermost is one around a learner, whose gradients wait."""
    rng = np.random.RandomState(seed)
    levels = [dict(length=2, sliced=True, reverse=bool(rng.randint(2)), unroll=1, carry=['raw'],
                   beside=['print', 'ordered', 'result'], jitted=True) for _ in range(2)]

    def run():
        task = Task('gru', 'd_rtrl', vmap=False, steps=8).begin()

        def inner():
            def step(total, slices):
                grads, loss, _ = task.grad(*slices)
                return add(total, grads), loss
            # a loop of brainstate keeps states; those of ``jax`` around it must not be written
            states = [s for s in brainstate.graph.states(task.algo).values()
                      if not isinstance(s, brainstate.ParamState)]
            before = [s.value for s in states]
            total, losses = brainstate.transform.scan(step, task.zeros(), (task.x, task.y))
            for state, value in zip(states, before, strict=True):
                state.value = value
            return sum(jnp.sum(a) for a in jax.tree.leaves(total)), losses
        return outcome(levels, inner)

    want = run()
    with fates() as seen, traceops.enabled(window=3):
        got = run()
    assert not isinstance(want[0], type), want
    assert len(seen) == 1 and seen[0].deferred and seen[0].window == 3
    ordered, unordered, traced = want[2]
    assert len(ordered) == 2 * (2 + 4) and len(unordered) == 2 + 4 and traced == [0, 1]
    assert want[0] == got[0] and want[2] == got[2], (want, got)
    assert [a[:3] for a in want[1]] == [a[:3] for a in got[1]]
