# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Loops written by hand: the same numbers as upstream, whatever waits until after the loop."""

import contextlib
import itertools
import re

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import traceops
from tests.parity.harness import BATCH, RULES, assert_close
from tests.parity.nets import N_OUT, NETS, Gated, Net
from traceops.compiler.jaxpr import inlined
from traceops.host import loops, plan
from traceops.host.deferred import Deferred

T = 7


@pytest.fixture(autouse=True)
def however_short(monkeypatch):
    """Loops of few steps are deferred as well (of ES-D-RTRL, upstream's way is as fast)."""
    monkeypatch.setattr(plan, 'SHORT', 0)


class Task:
    """A net, a learner (vmapped or batched) and data; what a hand-written loop starts from."""

    def __init__(self, net, rule, vmap=True, steps=T, **options):
        brainstate.random.seed(0)
        self.net = NETS[net] if isinstance(net, str) else net
        self.model = self.net.make()
        for state in self.model.states(brainstate.ParamState).values():
            state.value = jax.tree.map(lambda a: jnp.asarray(a, a.dtype), state.value)
        self.weights = self.model.states(brainstate.ParamState)
        cls, more = RULES[rule]
        if rule == 'eprop-random':
            more = {**more, 'random_feedback_key': brainstate.random.split_key()}
        self.algo = cls(self.model, **more, **options)
        self.x = self.net.inputs(steps, BATCH)
        self.y = jnp.asarray(np.random.RandomState(5).randn(steps, BATCH, N_OUT), float)
        self.w = jnp.asarray(np.random.RandomState(6).rand(steps), float)
        self.vmap = vmap
        self.run = None

    def begin(self):
        """Initialise states and compile, as the tutorial does, inside or outside of jit."""
        if self.vmap:
            @brainstate.transform.vmap_new_states(state_tag='new', axis_size=BATCH)
            def init():
                brainstate.nn.init_all_states(self.model)
                self.algo.compile_graph(self.x[0, 0])
            init()
            self.run = brainstate.nn.Vmap(self.algo, vmap_states='new')
        else:
            brainstate.nn.init_all_states(self.model, batch_size=BATCH)
            self.algo.compile_graph(self.x[0])
            self.run = self.algo
        return self

    def loss(self, x, y):
        out = self.run(x)
        return ((out - y) ** 2).mean(), out

    def grad(self, x, y):
        return brainstate.transform.grad(
            self.loss, self.weights, has_aux=True, return_value=True)(x, y)

    def zeros(self):
        return jax.tree.map(jnp.zeros_like, {k: v.value for k, v in self.weights.items()})

    def traces(self):
        return [st.value for name in ('etrace_bwg', '_trace_filters', 'etrace_xs', 'etrace_dfs')
                for st in getattr(self.algo, name, {}).values()]


@contextlib.contextmanager
def fates():
    """What becomes of the loops of this block."""
    seen = []
    token = loops.watching.set(seen)
    try:
        yield seen
    finally:
        loops.watching.reset(token)


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


def tutorial(task):
    """The loop of braintrace's SNN tutorial."""
    task.begin()

    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        return add(total, grads), (loss, out)
    return brainstate.transform.scan(step, task.zeros(), (task.x, task.y))


def compare(loop, net, rule, tolerance=1e-10, waits=True, begin=False, **options):
    """The loop upstream and with the fast path; returns what became of its loops."""
    settings = options.pop('settings', {})

    def run():
        task = Task(net, rule, **options)
        if begin:
            task.begin()
        brainstate.random.seed(11)
        out = brainstate.transform.jit(lambda: loop(task))()
        return (out, task.traces(), task.algo.running_index.value) if begin else out

    want = run()
    with fates() as seen, traceops.enabled(**settings):
        got = run()
    if waits is not None:
        assert [bool(one.deferred) for one in seen] == [waits] * len(seen) and seen, seen
    assert_close(want, got, tolerance, nonzero=True)
    return seen


def some(names, every, quick):
    """Cases of a product (the last axis turning fastest); those not in ``quick`` are slow."""
    def text(part):
        return getattr(part, '__name__', str(part))
    return pytest.mark.parametrize(names, [
        pytest.param(*case, id='-'.join(map(text, case)),
                     marks=[] if case in quick else pytest.mark.slow)
        for case in itertools.product(*every)])


VMAPPED = [name for name, net in NETS.items() if not net.not_vmapped]
BOTH = ['d_rtrl', 'es']


@some('net, rule', (VMAPPED, BOTH), [('alif', 'd_rtrl'), ('gru', 'es')])
def test_the_tutorial(float64, net, rule):
    compare(tutorial, net, rule)


@some('net, rule', ([n for n in NETS if NETS[n].engine == 'window'], BOTH), [
    ('alif', 'd_rtrl'), ('conv', 'd_rtrl'), ('embedding', 'es')])
def test_batch_mode(float64, net, rule):
    compare(tutorial, net, rule, vmap=False)


@some('rule, vmap', (RULES, (True, False)), [
    ('es-pair', True), ('ostl', True), ('eprop-random', False), ('eprop', False)])
def test_every_rule(float64, rule, vmap):
    if rule == 'eprop' and vmap:
        pytest.skip('upstream writes the filter from within vmap, and cannot run')
    compare(tutorial, 'alif', rule, vmap=vmap)


def weighted(task):
    """Each step has a weight; the mean is taken inside; a second tree has other weights."""
    task.begin()

    def step(carry, slices):
        total, other = carry
        x, y, w = slices
        grads, loss, out = task.grad(x, y)
        mean = jax.tree.map(lambda g: w * g / T, grads)
        twice = jax.tree.map(lambda g, m: (g - 2. * m).T.reshape(-1)[::-1], grads, mean)
        return (add(total, mean), add(other, twice)), (loss, w)
    flat = jax.tree.map(lambda a: a.reshape(-1), task.zeros())
    return brainstate.transform.scan(step, (task.zeros(), flat), (task.x, task.y, task.w))


def for_loop(task):
    """Gradients are kept in states; the loop returns outputs."""
    task.begin()
    totals = {k: brainstate.ShortTermState(v) for k, v in task.zeros().items()}

    def step(x, y, w):
        grads, loss, out = task.grad(x, y)
        for k, g in grads.items():
            totals[k].value = jax.tree.map(lambda a, b: a + w * b, totals[k].value, g)
        return out, loss
    out = brainstate.transform.for_loop(step, task.x, task.y, task.w)
    return out, {k: v.value for k, v in totals.items()}


def by_hand(task):
    """``jax.lax.scan``, every state passed by hand; the addition is a jitted function."""
    task.begin()
    states = [s for s in brainstate.graph.states(task.algo).values()
              if not isinstance(s, brainstate.ParamState)]
    plus = jax.jit(add)

    def step(carry, slices):
        values, total = carry
        for state, value in zip(states, values, strict=True):
            state.value = value
        grads, loss, out = task.grad(*slices)
        return ([s.value for s in states], plus(total, grads)), loss

    (values, total), losses = jax.lax.scan(
        step, ([s.value for s in states], task.zeros()), (task.x, task.y))
    for state, value in zip(states, values, strict=True):
        state.value = value
    return total, losses


def reverse(task):
    """The last step comes first."""
    task.begin()

    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        return add(total, grads), out
    return brainstate.transform.scan(step, task.zeros(), (task.x, task.y), reverse=True)


def as_one_vector(task):
    """Gradients are flattened into one vector before they are added up."""
    task.begin()
    flat, _ = jax.flatten_util.ravel_pytree(task.zeros())

    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        return total + jax.flatten_util.ravel_pytree(grads)[0], out
    return brainstate.transform.scan(step, flat, (task.x, task.y))


@some('loop, rule, vmap', ((weighted, for_loop, by_hand, reverse), BOTH, (True, False)), [
    (weighted, 'd_rtrl', True), (for_loop, 'd_rtrl', True),
    (by_hand, 'es', True), (reverse, 'd_rtrl', False)])
def test_other_loops(float64, loop, rule, vmap):
    net = 'gru' if loop is by_hand else 'vanilla'
    compare(loop, net, rule, vmap=vmap)


@pytest.mark.parametrize('rule', ['d_rtrl', pytest.param('es', marks=pytest.mark.slow)])
def test_one_vector(float64, rule):
    compare(as_one_vector, 'vanilla', rule)


SETTINGS = {'3': {'window': 3}, '1': {'window': 1}, 'budget': {'memory_budget': 3000}}


@some('rule, name', (('d_rtrl', 'es', 'eprop'), SETTINGS), [('d_rtrl', '3'), ('es', 'budget')])
def test_windows(float64, rule, name):
    seen = compare(tutorial, 'alif', rule, vmap=rule != 'eprop', settings=SETTINGS[name])
    assert all(one.window < T for one in seen)


def twice(task):
    """Two sequences in a row: the trace goes on from one to the other, and is looked at."""
    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        return add(total, grads), loss
    first = brainstate.transform.scan(step, task.zeros(), (task.x, task.y))
    return first, task.traces(), brainstate.transform.scan(step, first[0], (task.y[..., :1] + task.x
                                                           if not task.net.tokens else task.x,
                                                           task.y))


TWO = {'two_phase': True}


def counting(task):
    """Carries that count, that are only added to, and that are neither, beside the gradients."""
    task.begin()
    x0 = {'turn': jnp.int32(3), 'down': jnp.arange(2), 'loss': jnp.float64(1.), 'last': task.y[0],
          'mixed': jnp.zeros(()), 'key': jax.random.key(0)}

    def step(carry, slices):
        total, c = carry
        grads, loss, out = task.grad(slices[0] * (1. + .1 * c['turn']), slices[1])
        key, sub = jax.random.split(c['key'])
        c = {'turn': 2 + c['turn'] - 1, 'down': c['down'] - jnp.array([1, 2]),
             'loss': c['loss'] - .5 * loss, 'last': out, 'key': key,
             'mixed': .9 * c['mixed'] + c['down'].sum() * jax.random.uniform(sub) + loss}
        return (add(total, grads), c), (c['turn'], c['mixed'])
    (total, c), ys = brainstate.transform.scan(step, (task.zeros(), x0), (task.x, task.y))
    return total, {**c, 'key': jax.random.uniform(c['key'])}, ys


@some('loop, rule, vmap', ((tutorial, weighted, for_loop, by_hand, reverse, counting), BOTH,
                           (True, False)), [
    (tutorial, 'es', True), (tutorial, 'd_rtrl', False), (counting, 'es', True)])
def test_steps_in_two_phases(float64, loop, rule, vmap):
    """The form for GPUs: the loop only simulates, all else is computed of all steps together."""
    seen = compare(loop, 'alif', rule, vmap=vmap, settings=TWO)
    (said,) = {one.simulation for one in seen}
    assert said[0].startswith("the window's simulation: ")


@some('net, rule', (VMAPPED, BOTH), [('gru', 'es'), ('sparse', 'd_rtrl')])
def test_nets_in_two_phases(float64, net, rule):
    compare(tutorial, net, rule, settings=TWO)


@some('rule, name', (('d_rtrl', 'es', 'eprop'), ('3', '1', 'budget')), [('es', '3')])
def test_windows_in_two_phases(float64, rule, name):
    seen = compare(tutorial, 'alif', rule, vmap=rule != 'eprop',
                   settings={**TWO, **SETTINGS[name]})
    assert all(one.window < T for one in seen) or name == 'budget'


def test_effects_in_two_phases(float64):
    """Each once a step and in order, with the values that they would have."""
    def loop(task):
        task.begin()

        def step(total, slices):
            grads, loss, out = task.grad(*slices)
            jax.debug.callback(lambda v: heard.append(float(v)), loss, ordered=True)
            return add(total, grads), loss
        return brainstate.transform.scan(step, task.zeros(), (task.x, task.y))

    heard = []
    compare(loop, 'alif', 'es', settings=TWO)
    jax.effects_barrier()
    np.testing.assert_allclose(heard[:T], heard[T:], 1e-12)
    assert len(heard) == 2 * T


def test_the_running_index_is_no_state_of_the_simulation():
    """It counts; so are carries that are only added to."""
    program = []

    def loop(task):
        task.begin()

        def step(carry, slices):
            grads, loss, out = task.grad(*slices)
            return (add(carry[0], grads), carry[1] + loss, carry[2] + 1), out

        def run():
            return brainstate.transform.scan(
                step, (task.zeros(), jnp.zeros(()), 0), (task.x, task.y))
        program.append(brainstate.transform.make_jaxpr(run)()[0])
        return run()
    compare(loop, 'lif', 'es', 1e-5, settings=TWO)
    states = [v.aval for eqn in simulations(program[1].jaxpr) for v in eqn.params['step'].states]
    assert len(states) > 1 and all(
        a.shape[0] == BATCH and jnp.issubdtype(a.dtype, jnp.floating) for a in states)


def simulations(jaxpr):
    """The equations of simulations in a program, and in those within it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'etp_simulate_window':
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from simulations(inner)


@pytest.mark.parametrize('asked, turns', [
    (1, [{'1'}, {'5', '12'}]), (2, [{'2'}, {'2', '12'}]),
    pytest.param(True, [{'12'}] * 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('rule', ['es', pytest.param('d_rtrl', marks=pytest.mark.slow)])
def test_iterations_of_several_steps(float64, rule, asked, turns):
    """The form for GPUs: five steps an iteration, where the loop does not say how many (and the
    readout's own loop, of few operations, is one).
    """
    program = []

    def loop(task):
        task.begin()

        def step(total, slices):
            grads, loss, out = task.grad(*slices)
            return add(total, grads), (loss, out)

        def run():
            return brainstate.transform.scan(step, task.zeros(), (task.x, task.y), unroll=asked)
        program.append(str(brainstate.transform.make_jaxpr(run)()))
        return run()
    compare(loop, 'alif', rule, steps=12, waits=None, settings=TWO)
    assert turns == [
        set(re.findall(r'\blength=12.*?\bunroll=(\d+)', text, re.S)) for text in program]


@some('net, rule, vmap', (('lif', 'gru', 'sparse', 'lora', 'embedding', 'bypass'),
                          ('d_rtrl', 'es', 'eprop'), (True, False)), [
    ('lif', 'd_rtrl', True), ('sparse', 'd_rtrl', False), ('bypass', 'es', False),
    ('lif', 'eprop', False)])
def test_traces_that_enter_and_leave(float64, net, rule, vmap):
    if rule == 'eprop' and vmap:
        pytest.skip('upstream writes the filter from within vmap, and cannot run')
    seen = compare(twice, net, rule, begin=True, vmap=vmap)
    assert len(seen) == 2


class PlainReadout(Gated):
    """The readout is a plain layer: its gradient is no trace's, and stays in the loop."""

    def __init__(self):
        super().__init__(braintrace.nn.GRUCell)
        self.out = brainstate.nn.Linear(6, N_OUT)


@pytest.mark.parametrize('rule', ['d_rtrl', pytest.param('es', marks=pytest.mark.slow)])
def test_parameters_without_a_trace(float64, rule):
    compare(tutorial, Net(PlainReadout), rule)
    # in two phases it is summed over the steps by the product itself
    compare(tutorial, Net(PlainReadout), rule, settings=TWO)


@pytest.mark.parametrize('rule', ['d_rtrl', pytest.param('es', marks=pytest.mark.slow)])
def test_two_learners(float64, rule):
    def run():
        a, b = Task('lif', rule), Task('gru', 'es' if rule == 'd_rtrl' else 'd_rtrl')

        def train():
            a.begin()
            b.begin()

            def step(carry, slices):
                one, two = carry
                x, y, w = slices
                grads, loss, out = a.grad(x, y)
                more, loss2, _ = b.grad(x, y + out)
                return (add(one, grads), add(two, jax.tree.map(lambda g: w * g, more))), loss2
            return brainstate.transform.scan(step, (a.zeros(), b.zeros()), (a.x, a.y, a.w))
        return brainstate.transform.jit(train)()

    want = run()
    with fates() as seen, traceops.enabled():
        got = run()
    assert len(seen[0].deferred) == 2
    assert_close(want, got, 1e-10, nonzero=True)


@pytest.mark.parametrize('rule', [pytest.param('d_rtrl', marks=pytest.mark.slow), 'es'])
def test_single_precision(rule):
    compare(tutorial, 'alif', rule, tolerance=1e-5)


# -- loops that have to stay as they are --------------------------------------------------------

def clipped(task):
    task.begin()

    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        return add(total, brainstate.nn.clip_grad_norm(grads, 1e-2)), loss
    return brainstate.transform.scan(step, task.zeros(), (task.x, task.y))


def logged(task):
    task.begin()

    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        norm = jnp.sqrt(sum((g ** 2).sum() for g in jax.tree.leaves(grads)))
        return add(total, grads), norm
    return brainstate.transform.scan(step, task.zeros(), (task.x, task.y))


def stacked(task):
    task.begin()
    return brainstate.transform.for_loop(lambda x, y: task.grad(x, y)[0], task.x, task.y)


def online(task):
    """A step of the optimiser after every step of the net."""
    task.begin()

    def step(x, y):
        grads, loss, out = task.grad(x, y)
        for k, state in task.weights.items():
            state.value = jax.tree.map(lambda w, g: w - 0.1 * g, state.value, grads[k])
        return loss
    losses = brainstate.transform.for_loop(step, task.x, task.y)
    return losses, {k: v.value for k, v in task.weights.items()}


def decaying(task):
    task.begin()

    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        return jax.tree.map(lambda a, g: 0.9 * a + g, total, grads), loss
    return brainstate.transform.scan(step, task.zeros(), (task.x, task.y))


def branching(task):
    task.begin()

    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        large = sum(jnp.abs(g).max() for g in jax.tree.leaves(grads)) > 0.1
        return jax.lax.cond(large, add, lambda a, g: a, total, grads), loss
    return brainstate.transform.scan(step, task.zeros(), (task.x, task.y))


def watched(task):
    """The running sum is looked at."""
    task.begin()

    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        total = add(total, grads)
        return total, jax.tree.map(jnp.max, total)
    return brainstate.transform.scan(step, task.zeros(), (task.x, task.y))


def trace_read(task):
    task.begin()

    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        return add(total, grads), [jnp.sum(t) for t in jax.tree.leaves(task.traces())]
    return brainstate.transform.scan(step, task.zeros(), (task.x, task.y))


def replaced(task):
    """The last gradient only."""
    task.begin()

    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        return grads, loss
    return brainstate.transform.scan(step, task.zeros(), (task.x, task.y))


def inside_a_branch(task):
    """Gradients of the later steps only."""
    task.begin()

    def step(total, slices):
        x, y, t = slices

        def learn(x, y):
            grads, loss, _ = task.grad(x, y)
            return add(total, grads), loss
        return brainstate.transform.cond(
            t > 2, learn, lambda x, y: (total, task.loss(x, y)[0]), x, y)
    return brainstate.transform.scan(
        step, task.zeros(), (task.x, task.y, jnp.arange(len(task.x))))


STAY = (clipped, logged, stacked, online, decaying, branching, watched, trace_read, replaced,
        inside_a_branch)


@some('loop, rule, vmap', (STAY, BOTH, (True, False)),
      [(loop, 'd_rtrl', True) for loop in STAY] + [(clipped, 'es', True), (online, 'es', False)])
def test_loops_that_stay(float64, loop, rule, vmap):
    """Bit for bit, and with a reason."""
    seen = compare(loop, 'vanilla', rule, vmap=vmap, waits=False, tolerance=0.)
    assert all(reason for one in seen for _, reason in one.kept)


def test_a_loop_that_is_differentiated_is_the_one_that_was_written(float64):
    """The gradient of what a loop returns, with respect to its inputs."""
    def run():
        task = Task('gru', 'd_rtrl').begin()

        def outer(scale):
            def step(total, slices):
                x, y = slices
                grads, loss, out = task.grad(x, y)
                return add(total, jax.tree.map(lambda g: scale * g, grads)), loss
            total, losses = brainstate.transform.scan(step, task.zeros(), (task.x, task.y))
            return sum((g ** 2).sum() for g in jax.tree.leaves(total)) + losses.sum()
        return brainstate.transform.grad(outer, argnums=0)(2.)
    want = run()
    with traceops.enabled():
        got = run()
    assert_close(want, got, 1e-10, nonzero=True)


def test_a_mapped_training_step(float64):
    """``vmap`` of the whole loop over what scales its loss."""
    def run():
        task = Task('gru', 'd_rtrl', vmap=False).begin()
        states = [s for s in brainstate.graph.states(task.algo).values()
                  if not isinstance(s, brainstate.ParamState)]
        start = [s.value for s in states]

        def train(scale):
            for state, value in zip(states, start, strict=True):
                state.value = value

            def step(total, slices):
                grads, loss, out = task.grad(*slices)
                return add(total, jax.tree.map(lambda g: scale * g, grads)), loss
            out = brainstate.transform.scan(step, task.zeros(), (task.x, task.y))
            for state, value in zip(states, start, strict=True):
                state.value = value
            return out
        return brainstate.transform.jit(lambda: jax.vmap(train)(jnp.arange(1., 4.)))()
    want = run()
    with fates() as seen, traceops.enabled():
        got = run()
    assert seen[0].deferred
    assert_close(want, got, 1e-10, nonzero=True)


def forward(task):
    return brainstate.transform.for_loop(lambda x: task.run(x), task.x)


def warm_up(task):
    """Steps that only look, then steps that learn; the trace goes on, and is looked at."""
    def step(total, slices):
        grads, loss, out = task.grad(*slices)
        return add(total, grads), loss
    looked = brainstate.transform.for_loop(lambda x: task.run(x), task.x[:4])
    between = task.traces()
    learned = brainstate.transform.scan(step, task.zeros(), (task.x[4:], task.y[4:]))
    return looked, between, learned


@some('loop, net, rule, vmap', ((forward, warm_up), ('lif', 'conv', 'sparse', 'transformed'),
                                ('d_rtrl', 'eprop'), (True, False)), [
    (forward, 'lif', 'd_rtrl', False), (warm_up, 'lif', 'd_rtrl', True),
    (warm_up, 'conv', 'd_rtrl', False), (forward, 'lif', 'eprop', False)])
def test_loops_without_a_gradient(float64, loop, net, rule, vmap):
    """Their trace is formed once, as ``etrace_evolve`` forms it."""
    if rule == 'eprop' and vmap:
        pytest.skip('upstream writes the filter from within vmap, and cannot run')
    if vmap and NETS[net].not_vmapped:
        pytest.skip(NETS[net].not_vmapped)
    seen = compare(loop, net, rule, begin=True, vmap=vmap, waits=None, settings={'window': 3})
    assert [reason for _, reason in seen[0].forward] == [''] and seen[0].window == 3
    assert all(one.deferred for one in seen[1:])


@some('loop, rule, vmap', ((forward, warm_up), BOTH, (True, False)), [
    (warm_up, 'd_rtrl', False), (warm_up, 'es', True)])
def test_loops_without_a_gradient_in_two_phases(float64, loop, rule, vmap):
    seen = compare(loop, 'lif', rule, vmap=vmap, begin=True, waits=None, settings=TWO)
    assert [reason for _, reason in seen[0].forward] == ['']


def test_no_pass_over_the_trace_is_left_in_a_loop_without_a_gradient():
    """Counted in the program: only the loop of upstream's carries the trace."""
    def carried():
        task = Task('vanilla', 'd_rtrl', vmap=False).begin()
        size = max(a.size for a in jax.tree.leaves(task.traces()))
        closed, _ = brainstate.transform.make_jaxpr(lambda: forward(task))()
        loop, = (e for e in inlined(closed).jaxpr.eqns if e.primitive.name == 'scan')
        return any(v.aval.size == size for v in loop.outvars)
    assert carried()
    with traceops.enabled():
        assert not carried()


def test_forward_loops_of_the_factorised_rule_stay(float64):
    """Nothing is gained there, and it says so."""
    seen = compare(forward, 'vanilla', 'es', begin=True, waits=False, tolerance=0.)
    assert 'no trace of the size' in seen[0].forward[0][1]


@pytest.mark.parametrize('rule', ['d_rtrl', pytest.param('es', marks=pytest.mark.slow)])
def test_vmap_around_a_batch(float64, rule):
    """Lanes outside, a batch inside."""
    def run():
        task = Task('alif', rule, vmap=False)
        x, y = (a.reshape(len(a), 2, BATCH // 2, -1) for a in (task.x, task.y))

        @brainstate.transform.vmap_new_states(state_tag='new', axis_size=2)
        def init():
            brainstate.nn.init_all_states(task.model, batch_size=BATCH // 2)
            task.algo.compile_graph(x[0, 0])
        init()
        lanes = brainstate.nn.Vmap(task.algo, vmap_states='new')
        grad = brainstate.transform.grad(lambda *now: ((lanes(now[0]) - now[1]) ** 2).mean(),
                                         task.weights)
        return brainstate.transform.jit(lambda: brainstate.transform.scan(
            lambda total, now: (add(total, grad(*now)), None), task.zeros(), (x, y))[0])()

    want = run()
    with fates() as seen, traceops.enabled():
        got = run()
    assert seen[0].deferred
    assert_close(want, got, 1e-10, nonzero=True)


@pytest.mark.parametrize('net, rule, window, zero', [
    ('alif', 'd_rtrl', None, True), ('conv', 'd_rtrl', None, True), ('gru', 'eprop', None, True),
    pytest.param('alif', 'd_rtrl', 3, True, marks=pytest.mark.slow),
    ('lif', 'd_rtrl', None, False)])
def test_a_trace_that_a_reset_made_is_known_to_be_zero(float64, monkeypatch, net, rule, window,
                                                       zero):
    """As of a call: nothing of the trace that enters is computed. Not after a step."""
    known, original = [], Deferred.entering

    def entering(self, init, once):
        carry = original(self, init, once)
        known.append(once and not carry)
        return carry
    monkeypatch.setattr(Deferred, 'entering', entering)

    def loop(task):
        task.begin()
        if not zero:
            task.run(task.x[0])

        def step(total, slices):
            grads, loss, _ = task.grad(*slices)
            return add(total, grads), loss
        return brainstate.transform.scan(step, task.zeros(), (task.x, task.y)), task.traces()
    compare(loop, net, rule, vmap=False, settings={'window': window})
    assert any(known) == (zero and window is None)
