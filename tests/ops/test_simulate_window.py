# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``simulate_window``: the reference, which steps can be kernels, and what their texts are."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops.kernels.simulate_window as package
from tests.ops import suites
from tests.ops.steps import STEPS, dropout, lif, operands_of
from traceops import ops
from traceops.kernels.simulate_window import launch
from traceops.kernels.simulate_window.anatomy import anatomy, resized
from traceops.kernels.simulate_window.step import UnsupportedError, trace_step
from traceops.ops.simulate_window import SIMULATE_WINDOW
from traceops.ops.simulation_trial import trial

EXAMPLES = pathlib.Path(package.__file__).parent / 'examples'


class TestReference(suites.SimulateWindowSuite):
    """Without triton the kernels are not run; texts are written all the same."""


def traced(name, **sizes):
    step, operands = trace_step(*operands_of(name, **sizes), 1, '')
    return step, operands


def test_the_reference_is_the_scan_to_the_bit():
    """Also where the step is a primitive's parameter."""
    step, constants, slices, states = operands_of('alif', T=20, N=40)

    @jax.jit
    def as_written(constants, slices, states):
        def body(states, x):
            return step(constants, x, states)
        return jax.lax.scan(body, states, slices)
    got = jax.jit(lambda *a: ops.simulate_window(step, *a))(constants, slices, states)
    jax.tree.map(np.testing.assert_array_equal, got,
                 as_written(constants, slices, states))


@pytest.mark.parametrize('name', ['lif', 'alif', 'gru'])
def test_the_text_is_the_example(name):
    """Rewrite them with ``python -m tests.ops.test_simulate_window``, and read what has changed."""
    _, text = launch.kernel_of(traced(name, N=128)[0])
    assert text.source == (EXAMPLES / f'{name}.txt').read_text(encoding='utf-8')


@pytest.mark.parametrize('name', STEPS)
def test_the_same_step_is_the_same_kernel(name):
    """Traced twice: equal, one text, one name, so that every cache hits."""
    (one, operands), (two, _) = traced(name), traced(name)
    assert one == two and hash(one) == hash(two) and one is not two
    calls = [launch.plan(*operands, step=s, capability=90) for s in (one, two)]
    assert calls[0].kernel == calls[1].kernel
    assert one != traced(name, N=24)[0]
    assert all(len(line) <= 100 for line in launch.kernel_of(one)[1].source.splitlines())


def test_what_depends_on_no_input_is_a_number():
    """Here the number is a chain of operations."""
    def step(constants, slices, states):
        decay = jnp.exp(-jnp.full((3, 20), 1.) / 20.)
        return [states[0] * decay + slices[0]], []

    found, _ = trace_step(step, [], [jnp.ones((4, 3, 20))], [jnp.ones((3, 20))], 1, '')
    _, text = launch.kernel_of(found)
    (factor,) = re.findall(r's0 \* ([0-9.]+) \+ x0', text.source)
    assert abs(float(factor) - np.exp(-.05)) < 1e-7 and not text.vectors


@pytest.mark.parametrize('name, exchanges, streams', [
    ('lif', [(True, False, 1)], 1), ('lateral', [(True, True, 1)], 1),
    ('two_layers', [(True, False, 1), (True, False, 1), (True, False, 1)], 1),
    ('gru', [(False, True, 2), (False, True, 1)], 3), ('lstm', [(False, True, 4)], 4),
    ('refractory', [(True, False, 1)], 2)])
def test_what_is_exchanged(name, exchanges, streams):
    """(Events, values too, products that read them.) Parts known ahead are products of all steps.
    """
    _, text = launch.kernel_of(traced(name)[0])
    assert [(e.events, e.scaled, e.products) for e in text.exchanges] == exchanges
    assert len(text.streams) == streams


def test_spikes_that_are_carried_are_events():
    """What is sent is a state, which is always made of spikes."""
    def step(constants, slices, states):
        (W,), (x,), (V, spikes) = constants, slices, states
        V = .5 * V + x + spikes @ W
        return [V, (V > 1.).astype(V.dtype)], [V]

    N = 16
    found, _ = trace_step(step, [jnp.ones((N, N))], [jnp.ones((4, 3, N))],
                          [jnp.ones((3, N))] * 2, 1, '')
    assert launch.kernel_of(found)[1].exchanges[0].events


X, V, W = jnp.ones((4, 3, 20)), jnp.ones((3, 20)), jnp.ones((20, 20))
REFUSED = {
    'random numbers of another generator': (
        lambda c, x, s: ([s[0] + jax.random.uniform(
            jax.random.wrap_key_data(x[1], impl='rbg'), (3, 20))], []),
        [], [X, jnp.zeros((4, 4), jnp.uint32)], [V],
        'the step draws random numbers (random_wrap), by a generator that gives others'),
    'random numbers of what neurons do': (
        lambda c, x, s: ([s[0] + jax.random.uniform(jax.random.key(
            s[0].sum().astype(jnp.int32)), (3, 20))], []),
        [], [X], [V], 'the step draws random numbers from its states (random_'),
    'a key that neurons feed': (
        lambda c, x, s: ([s[0] + x[0], s[1] + s[0].sum().astype(jnp.uint32)], []),
        [], [X], [V, jnp.zeros((2,), jnp.uint32)],
        'the kernel computes in float32, a state is uint32'),
    'an effect': (
        lambda c, x, s: (jax.debug.print('{}', s[0][0, 0]), ([s[0] + x[0]], []))[1],
        [], [X], [V], 'the step does something besides computing (debug_'),
    'float64': (
        lambda c, x, s: ([s[0] + x[0]], []), [], [X.astype(jnp.float16)],
        [V.astype(jnp.float16)], 'the kernel computes in float32, a state is float16'),
    'no state': (lambda c, x, s: ([], [x[0] + 1.]), [], [X], [],
                 'no state passes from step to step'),
    'samples that differ': (
        lambda c, x, s: ([s[0] + 1., s[1] + 1.], []), [], [X], [V, jnp.ones((2, 20))],
        'states of shapes (3, 20) and (2, 20) do not share their leading axes'),
    'samples that meet': (
        lambda c, x, s: ([s[0] - s[0].sum(0) + x[0]], []), [], [X], [V],
        'reduce_sum of float32[3,20] over samples'),
    'two values that change': (
        lambda c, x, s: ([s[0] @ (W * x[0][0])], []), [], [X], [V],
        'a product of two values that both change from step to step'),
    'weights of each sample': (
        lambda c, x, s: ([jnp.einsum('bi,bij->bj', s[0], c[0]) + x[0]], []),
        [jnp.ones((3, 20, 20))], [X], [V], 'a product of float32[3,20] and float32[3,20,20]'),
    'a convolution': (
        lambda c, x, s: ([jax.lax.conv_general_dilated(
            s[0][:, None], c[0], (1,), 'SAME')[:, 0] + x[0]], []),
        [jnp.ones((1, 1, 3))], [X], [V], 'a value of shape (3, 1, 20)'),
    'a concatenation': (
        lambda c, x, s: ([jnp.concatenate([s[0][:, :10], x[0][:, :10]], -1)], []), [], [X], [V],
        'slice of float32[3,20]'),
    'one that is read': (
        lambda c, x, s: ([s[0]], [jnp.tanh(jnp.concatenate([s[0], x[0]], -1))]), [], [X], [V],
        'a concatenation that tanh reads, which is no product'),
    'an unknown operation': (
        lambda c, x, s: ([jnp.cumsum(s[0], -1) + x[0]], []), [], [X], [V],
        'cumsum of float32[3,20]'),
    'another type within': (
        lambda c, x, s: ([(s[0].astype(jnp.bfloat16) * 2).astype(jnp.float32) + x[0]], []), [],
        [X], [V], 'the kernel computes in float32, the step in bfloat16'),
    'what is kept is a mask': (
        lambda c, x, s: ([s[0] + x[0]], [s[0] > 0.]), [], [X], [V],
        'the kernel computes in float32, what is kept is bool'),
    'too many neurons': (
        lambda c, x, s: ([s[0] + x[0]], []), [], [jnp.ones((1, 1, 8193))], [jnp.ones((1, 8193))],
        'a program has 8192 neurons at most, the step 8193'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_a_kernel_says_why_and_keeps_the_loop(name):
    step, constants, slices, states, reason = REFUSED[name]
    simulation = ops.Simulation(step, constants, slices, states)
    assert simulation.reason.startswith(reason)
    assert str(simulation).startswith(f'the loop: {reason}')
    jaxpr = jax.make_jaxpr(lambda *a: ops.simulate_window(step, *a))(constants, slices, states)
    names = [e.primitive.name for e in jaxpr.jaxpr.eqns]
    assert 'scan' in names and 'etp_simulate_window' not in names
    with pytest.raises(ops.BackendError, match="backend='triton' was asked for, but"):
        ops.simulate_window(step, constants, slices, states, backend='triton')


@pytest.mark.parametrize('lanes, backend, calls', [
    (3, 'triton', 3), (12, 'triton', 12), (3, 'jax', 0), (12, 'auto', 0)])
def test_lanes_with_weights_of_their_own(lanes, backend, calls):
    """A launch each where the kernel is asked for; the automatic choice says why it is the loop."""
    step, constants, slices, states = operands_of('lif')
    made = []

    def run(W):
        made.append(ops.Simulation(step, [W, *constants[1:]], slices, states, backend=backend))
        return made[0].run()
    found = jax.make_jaxpr(jax.vmap(run))(jnp.stack([constants[0]] * lanes))
    names = [e.primitive.name for e in found.jaxpr.eqns]
    assert names.count('etp_simulate_window') == calls
    assert ('scan' in names) == (calls == 0)
    said = f'{lanes} lanes cannot share a launch (a product of float32[{lanes},3,32]'
    assert [text.startswith(said) for text in made[0].step.said] == [True] * (backend == 'auto')


def test_inputs_that_the_lanes_share_are_those_of_each():
    step, constants, slices, states = operands_of('lif')
    found = jax.make_jaxpr(jax.vmap(lambda s: ops.simulate_window(
        step, constants, slices, s, backend='triton')))([jnp.stack([a] * 3) for a in states])
    assert [e.primitive.name for e in found.jaxpr.eqns].count('etp_simulate_window') == 1


def test_the_automatic_choice_by_size():
    """Events up to 4096 neurons; of gated nets, weights that stay in a multiprocessor."""
    def rather(name, N, capability=90):
        sizes = [jax.eval_shape(lambda: operands_of(name, T=2, N=N)[1:])][0]
        found, operands = trace_step(STEPS[name][0], *sizes, 1, '')
        return launch.plan(*operands, step=found, capability=capability).rather

    assert not rather('lif', 4096) and '4097 neurons' in rather('lif', 4097)
    assert not rather('gru', 128) and '768 KiB' in rather('gru', 256)
    assert not rather('gru', 104, 80) and 'KiB' in rather('gru', 128, 80)


def test_what_is_said_of_it():
    step, operands = traced('lif', N=128)
    assert launch.described(step) == 'events of 1 product, 8 rows at a time'
    assert launch.described(traced('gru', N=128)[0]) == (
        'all rows of 3 products, 16 or 32 rows at a time')
    simulation = ops.Simulation(*operands_of('lif'))
    assert str(simulation) == ('the loop: kernels run on NVIDIA GPUs and this program is for cpu')
    assert ops.why('simulate_window', *operands, step=step).backend == 'jax'


@pytest.mark.parametrize('name', STEPS)
def test_a_part_of_the_samples(name):
    """As a device has it: the same step, of fewer."""
    step, _ = traced(name, batch=(6,))
    part = resized(step, (2,))
    assert anatomy(part).samples == (2,)
    assert launch.kernel_of(part)[1].source == \
        launch.kernel_of(traced(name, batch=(2,))[0])[1].source


@pytest.mark.parametrize('name', ['lif', 'lateral', 'gru'])
def test_a_kernel_is_tried_against_full_float32(name):
    """By default products are coarser on a GPU, and a right kernel would be found wrong."""
    step, operands = traced(name)
    seen = []

    def bind(*given, request, devices, step):
        seen.append(step)
        return SIMULATE_WINDOW.primitive.bind(*given, request='jax', devices=devices, step=step)
    operation = types.SimpleNamespace(primitive=types.SimpleNamespace(bind=bind))
    right, found = trial(operation, operands, {'step': step}, jax.devices()[0])
    assert right and 'checked on this device' in found
    products = [e for s in seen for e in s.closed.jaxpr.eqns if e.primitive.name == 'dot_general']
    assert products and {e.params['precision'] for e in products} == {
        (jax.lax.Precision.HIGHEST,) * 2}
    assert {launch.name(s) for s in seen} == {launch.name(step)}        # the kernel is the same


def test_keys_and_counters_are_no_states_of_the_kernel():
    """They are had ahead, and the draws of all steps too; a device's part has no such kernel."""
    _, constants, slices, states = operands_of('lif', batch=(6,))
    states = [*states, jax.random.key_data(jax.random.key(3)), jnp.int32(4)]
    simulation = ops.Simulation(dropout, constants, slices, states)
    assert not simulation.reason and [v.aval.shape for v in simulation.step.states] == [(6, 20)]
    _, text = launch.kernel_of(simulation.step)
    assert 'random' not in text.source and len(text.streams) == 3
    call = launch.plan(*simulation.operands, step=simulation.step, capability=90)
    assert call.grid == (6,)
    with pytest.raises(UnsupportedError, match='a device would draw'):
        resized(simulation.step, (2,))
    # keys that come from outside are the same
    given = ops.Simulation(lambda c, x, s: ([s[0] + jax.random.uniform(
        jax.random.wrap_key_data(x[1]), (3, 20))], []), [], [X, jnp.zeros((4, 2), jnp.uint32)], [V])
    assert not given.reason


def test_no_array_is_held():
    """After it has run, what tells about it has shapes alone."""
    simulation = ops.Simulation(*operands_of('lif'))
    simulation.run()
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in simulation.operands)


def test_errors_of_what_is_no_step():
    with pytest.raises(UnsupportedError, match='no state'):
        anatomy(trace_step(lambda c, x, s: ([], []), [], [X], [], 1, '')[0])
    with pytest.raises(ValueError, match="backend='gpu' is not known"):
        ops.simulate_window(lif, *operands_of('lif')[1:], backend='gpu')


if __name__ == '__main__':
    EXAMPLES.mkdir(exist_ok=True)
    for example in ('lif', 'alif', 'gru'):
        (EXAMPLES / f'{example}.txt').write_text(
            launch.kernel_of(traced(example, N=128)[0])[1].source, encoding='utf-8')
