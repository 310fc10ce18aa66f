# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Every loop of the process is jax's own: traced as often, with its errors and its results."""

import functools
import itertools

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import traceops
from tests.parity.test_loops import Task, add, fates
from traceops.host import loops

ORIGINAL = jax.lax.scan
xs = np.arange(1., 4., dtype=np.float32)


@pytest.fixture
def learner(compiled_quickly):
    """A fast learner is alive, so that loops are looked at."""
    with traceops.enabled():
        net = braintrace.nn.GRUCell(3, 4)
        yield braintrace.compile(net, braintrace.D_RTRL, jnp.zeros((2, 3)), batch_size=2)


class Counted:
    """A function that counts its calls."""

    def __init__(self, fn):
        self.fn, self.calls = fn, 0

    def __call__(self, *args):
        self.calls += 1
        return self.fn(*args)


def nested(depth, body, scan):
    """Loops in loops; the innermost is the body's."""
    for _ in range(depth - 1):
        body = functools.partial(lambda inside, c, x: (scan(inside, c, xs)[0], None), body)
    return lambda: scan(body, jnp.float32(0.), xs)[0]


AROUND = {
    'nothing': lambda run: run(),
    'jit': lambda run: jax.jit(run)(),
    'grad': lambda run: jax.grad(lambda a: a * run())(2.),
    'vmap': lambda run: jax.vmap(lambda a: a + run())(xs),
    'checkpoint': lambda run: jax.grad(jax.checkpoint(lambda a: a * run()))(2.),
    'cond': lambda run: jax.lax.cond(xs[0] > 0., run, lambda: 0.),
    'while_loop': lambda run: jax.lax.while_loop(
        lambda c: c < 1., lambda c: c + run(), jnp.float32(0.)),
    'closure': lambda run: jax.jit(lambda x: jax.lax.scan(
        lambda c, a: (c + x.sum() * run(), None), jnp.float32(0.), x)[0])(xs),
}


@pytest.mark.parametrize('around', AROUND)
@pytest.mark.parametrize('scan', [jax.lax.scan, brainstate.transform.scan],
                         ids=['jax', 'brainstate'])
def test_a_body_is_traced_as_often(around, scan):
    """At any depth, in all that traces it."""
    def run(depth):
        body = Counted(lambda c, x: (c + jnp.sin(x), None))
        # by its name: what is in its place is looked up when it is called
        now = (lambda *args: jax.lax.scan(*args)) if scan is ORIGINAL else scan
        return AROUND[around](nested(depth, body, now)), body.calls

    want = [run(depth) for depth in range(1, 5)]
    with traceops.enabled():
        alive = braintrace.compile(braintrace.nn.GRUCell(3, 4), braintrace.D_RTRL,
                                   jnp.zeros((2, 3)), batch_size=2)
        got = [run(depth) for depth in range(1, 5)]
    assert alive and [calls for _, calls in want] == [calls for _, calls in got]
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_what_jax_remembers_of_a_body_is_remembered(learner):
    body = Counted(lambda c, x: (c + x, c))
    first = jax.lax.scan(body, 0., xs)
    again = jax.lax.scan(body, 0., xs)
    assert body.calls <= 2          # a number's type is found out by tracing it once more
    calls = body.calls
    ORIGINAL(body, 0., xs)
    assert body.calls == calls
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize('depth', [1, 2, 3])
@pytest.mark.parametrize('waits', [True, False])
def test_a_body_with_a_step_is_traced_as_often(compiled_quickly, depth, waits):
    """And loops around it are, whether its gradients wait or not."""
    def run():
        task = Task('gru', 'd_rtrl', vmap=False, steps=8).begin()
        counts = [0] * depth

        def step(total, slices):
            counts[0] += 1
            grads, loss, _ = task.grad(*slices)
            return add(total, grads), loss if waits else jax.tree.map(jnp.max, grads)

        def loop(level, total):
            if level == 0:
                return brainstate.transform.scan(step, total, (task.x, task.y))[0]

            def around(total, _):
                counts[level] += 1
                return loop(level - 1, total), None
            return brainstate.transform.scan(around, total, jnp.arange(2))[0]
        brainstate.transform.make_jaxpr(lambda: loop(depth - 1, task.zeros()))()
        return counts

    want = run()
    with fates() as seen, traceops.enabled(window=8):
        got = run()
    assert want == got and seen and bool(seen[-1].deferred) == waits, (want, got, seen)


def test_python_in_a_body_happens_once(learner):
    numbers, drawn = iter([2., 30.]), np.random.RandomState(0)
    total, out = jax.lax.scan(lambda c, x: (c + x * next(numbers), drawn.rand()),
                              jnp.float32(0.), xs)
    assert total == 12. and next(numbers) == 30.
    np.testing.assert_allclose(out, np.random.RandomState(0).rand(), rtol=1e-6)


@pytest.mark.parametrize('error', [StopIteration, ValueError, KeyboardInterrupt])
def test_an_error_of_the_first_trace_is_the_users(learner, error):
    raised = []

    def body(c, x):
        if not raised:
            raised.append(1)
            raise error('the first time only')
        return c, x
    with pytest.raises(error, match='the first time only'):
        jax.lax.scan(body, 0., xs)


odd = object()          # of no type of jax's


def step(c, x):
    return c + 1, x


CALLS = {
    'positional': lambda scan: scan(step, 0, None, 4, True, 2),
    'keywords': lambda scan: scan(f=step, init=0, xs=xs, reverse=True),
    'nothing to scan': lambda scan: scan(step, 0, None),
    'no steps': lambda scan: scan(step, 0, xs[:0]),
    'empty trees': lambda scan: scan(lambda c, x: (c, ()), {}, [], length=3),
    'numpy': lambda scan: scan(lambda c, x: (c, x), np.float64(2), np.arange(3)),
    'a bool': lambda scan: scan(lambda c, x: (~c, c), True, None, length=np.int64(3)),
    'a traced length': lambda scan: scan(step, 0, None, length=jnp.int32(3)),
    'a fraction': lambda scan: scan(step, 0, None, length=3.5),
    'ragged': lambda scan: scan(step, 0, (xs, xs[:2])),
    'a scalar': lambda scan: scan(step, 0, 3.),
    'text': lambda scan: scan(step, 0, 'abc'),
    'an object': lambda scan: scan(step, odd, xs),
    'not a function': lambda scan: scan(3, 0, xs),
    'not a pair': lambda scan: scan(lambda c, x: c, 0, xs),
    'another carry': lambda scan: scan(lambda c, x: ((c, c), x), 0, xs),
    'another type': lambda scan: scan(lambda c, x: (c + 1.5, x), 0, xs),
    'unroll': lambda scan: scan(step, 0, xs, unroll=True),
    'unroll 0': lambda scan: scan(step, 0, xs, unroll=-1),
    'split': lambda scan: scan(step, 0, xs, _split_transpose=True),
    'unknown': lambda scan: scan(step, 0, xs, spam=1),
    'keys': lambda scan: scan(lambda c, k: (jax.random.split(c)[0], jax.random.uniform(k)),
                              jax.random.key(1), jax.random.split(jax.random.key(0), 3)),
    'float0': lambda scan: scan(lambda c, x: (c, x), np.zeros(3, jax.dtypes.float0), xs),
    'a partial': lambda scan: scan(functools.partial(step), 0, xs),
}


def outcome(call):
    try:
        out = call()
    except Exception as err:
        return type(err), str(err)
    leaves, tree = jax.tree.flatten(out)
    return tree, [(type(a), np.shape(a), jnp.result_type(a), getattr(a, 'weak_type', None),
                   str(a)) for a in leaves]


@pytest.mark.parametrize('name', CALLS)
def test_arguments_reach_the_original_untouched(learner, name):
    """Results, their types, and errors."""
    assert jax.lax.scan is not ORIGINAL
    assert outcome(lambda: CALLS[name](ORIGINAL)) == outcome(lambda: CALLS[name](jax.lax.scan))


def test_a_symbolic_length(learner):
    steps, = export.symbolic_shape('steps')
    program = export.export(jax.jit(lambda x: jax.lax.scan(
        lambda c, a: (c + a, None), jnp.float32(0.), x)[0]))(
        jax.ShapeDtypeStruct((steps,), jnp.float32))
    assert program.call(xs) == xs.sum()


@pytest.mark.parametrize('jitted', [True, False])
def test_a_program_is_the_same_text(learner, jitted):
    """Nothing is in it that jax's own scan does not put there."""
    def text(scan):
        def fn(x):
            r = jax.new_ref(jnp.zeros(()))

            def body(c, a):
                r[...] += a
                jax.debug.print('{}', a)
                return c * x.sum(), a
            return scan(body, 0., x), r[...]
        return jax.jit(fn).lower(xs).as_text() if jitted else str(jax.make_jaxpr(fn)(xs))
    lines = [text(scan).splitlines() for scan in (ORIGINAL, jax.lax.scan)]
    assert len(lines[0]) > 10
    for a, b in itertools.zip_longest(*lines):
        assert a == b or '0x' in a or 'callback' in a, (a, b)   # addresses of callbacks


@pytest.mark.parametrize('init', [0., 0, np.float32(0.), jnp.float32(0.)], ids=repr)
def test_a_loop_outside_jit_is_looked_at_once_and_compiled_once(learner, monkeypatch, init):
    looked, compiled = [], []
    looks = loops.TracedCall
    monkeypatch.setattr(loops, 'TracedCall', lambda call: (looked.append(1), looks(call))[1])

    def listen(name, seconds, **more):
        compiled.append('backend_compile' in name)

    def body(c, x):
        return c + jnp.float32(x), c
    with traceops.enabled():
        results = [jax.lax.scan(body, init, xs)]
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            results += [jax.lax.scan(body, init, xs) for _ in range(3)]
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert len(looked) == 1 and not any(compiled)
        for again in results:
            np.testing.assert_array_equal(again[1], results[0][1])
        jax.lax.scan(lambda c, x: (c, None), 0., xs)
        assert len(looked) == 2
        # a step may have come into the body since
        made = braintrace.compile(braintrace.nn.GRUCell(3, 4), braintrace.D_RTRL,
                                  jnp.zeros((2, 3)), batch_size=2)
        jax.lax.scan(body, init, xs)
        assert len(looked) == 3 and made is not None
