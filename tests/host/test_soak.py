# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Training for long: nothing grows, nothing is compiled again, and a checkpoint resumes it."""

import gc
import os
import random
import resource
import signal
import subprocess
import sys
import time

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saiunit as u

import traceops
from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import of_case


class Training:
    """One learner, trained a call at a time."""

    def __init__(self, way, rule, neurons):
        brainstate.environ.set(dt=1. * u.ms)
        case = of_case(Case('soak', 'lif', rule, neurons, None, steps=5, batch=3, n_in=7))
        self.x = 40 * case.inputs               # that they spike
        with traceops.configured(window=5):
            self.learner = traceops.compile(case.model, case.algorithm, self.x[0], **case.options)
        self.weights, self.traced = self.learner.param_states, 0
        self.call = brainstate.transform.jit(lambda: self._call(way))

    def _call(self, way):
        self.traced += 1
        grads, loss = getattr(self, way)()
        for key, weight in self.weights.items():
            weight.value = jax.tree.map(lambda w, g: w - 1e-3 * g, weight.value, grads[key])
        return loss

    def _loss(self, x):
        return (self.learner(x) ** 2).mean()

    def etrace_grad(self):
        return self.learner.etrace_grad(self.x, step_fn=self._loss, return_value=True,
                                        loss_output='scalar')

    def step(self):
        return brainstate.transform.grad(
            lambda: self._loss(self.x[0]), self.weights, return_value=True)()

    def loop(self):
        def body(total, x):
            grads, loss = brainstate.transform.grad(
                lambda: self._loss(x), self.weights, return_value=True)()
            return jax.tree.map(jnp.add, total, grads), loss
        zeros = {k: jax.tree.map(jnp.zeros_like, w.value) for k, w in self.weights.items()}
        grads, losses = brainstate.transform.scan(body, zeros, self.x)
        return grads, losses.sum()

    def states(self):
        """In an order that does not come from addresses, by which upstream names traces."""
        traces = [s for name in ('etrace_bwg', 'etrace_xs', 'etrace_dfs')
                  for s in getattr(self.learner, name, {}).values()]
        states = [*self.learner.graph_executor.model.states().values(), *traces,
                  self.learner.running_index]
        assert len(states) == len(brainstate.graph.states(self.learner))
        return states


def size():
    gc.collect()
    with open('/proc/self/statm') as pages:
        resident = int(pages.read().split()[1]) * resource.getpagesize()
    return len(gc.get_objects()), len(jax.live_arrays()), resident


CASES = [(way, rule) for way in ('etrace_grad', 'loop', 'step') for rule in ('D_RTRL', 'ES_D_RTRL')]


@pytest.mark.usefixtures('compiled_quickly')
@pytest.mark.parametrize('way, rule, neurons, calls', [
    *[pytest.param(*case, 128, 2000, marks=pytest.mark.slow) for case in CASES],
    ('loop', 'D_RTRL', 16, 60), ('etrace_grad', 'ES_D_RTRL', 16, 60)])
def test_training_for_long(way, rule, neurons, calls):
    with traceops.enabled():
        one, other = Training(way, rule, neurons), Training(way, rule, neurons)
        curve = [float(one.call()) for _ in range(4)]
        traced, (objects, arrays, resident) = one.traced, size()
        killed = random.randrange(5, calls - 5)
        for i in range(4, calls):
            if i == killed:
                kept = [jax.tree.map(np.array, s.value) for s in one.states()]
            curve.append(float(one.call()))
        now = size()
        assert one.traced == traced
        assert now[0] - objects < calls // 2 + 50           # the curve itself is no object of gc's
        assert now[1] <= arrays and now[2] - resident < 2 ** 26
        for state, value in zip(other.states(), kept, strict=True):
            state.value = jax.tree.map(jnp.asarray, value)
        resumed = [float(other.call()) for _ in range(min(20, calls - killed))]
        assert len(set(curve)) > calls // 2
        np.testing.assert_allclose(resumed, curve[killed:killed + len(resumed)], rtol=1e-5)


CHILD = '''
import os, sys, time, warnings
warnings.simplefilter('ignore')
import braintools, jax, numpy as np, traceops
from tests.host.test_soak import Training
folder, way, rule, calls = *sys.argv[1:4], int(sys.argv[4])
kept = os.path.join(folder, 'kept.msgpack')
jax.config.update('jax_disable_most_optimizations', True)
traceops.install()
one = Training(way, rule, 16)
def tree(done):
    return {'done': np.int64(done), **{
        str(i): jax.tree.map(np.array, s.value) for i, s in enumerate(one.states())}}
first = 0
if os.path.exists(kept):
    read = braintools.file.msgpack_load(kept, tree(0), verbose=False)
    first = int(read['done'])
    for i, state in enumerate(one.states()):
        state.value = jax.tree.map(jax.numpy.asarray, read[str(i)])
for call in range(first, calls):
    if call % 5 == 0:
        braintools.file.msgpack_save(kept + '.new', tree(call), verbose=False)
        os.replace(kept + '.new', kept)
    print(call, repr(float(one.call())), flush=True)
    time.sleep(.01)         # or all is said before the signal arrives
'''


def trained(folder, *case, killed=None):
    """``{call: loss}`` of a process of its own, killed once it has said so many losses."""
    folder.mkdir(exist_ok=True)
    child = subprocess.Popen([sys.executable, '-c', CHILD, str(folder), *map(str, case)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': '.'})
    said = []
    for line in child.stdout:
        said.append(line.split())
        if len(said) == killed:
            time.sleep(random.random() / 50)
            child.kill()
    errors = child.stderr.read()
    assert child.wait() == (0 if killed is None else -signal.SIGKILL), errors
    return {int(call): float(loss) for call, loss in (one for one in said if len(one) == 2)}


@pytest.mark.slow
@pytest.mark.parametrize('way, rule', [('loop', 'D_RTRL'), ('etrace_grad', 'ES_D_RTRL')])
def test_killed_at_a_random_moment_and_resumed_in_a_new_process(tmp_path, way, rule):
    calls, killed = 60, random.randrange(6, 30)
    curve = trained(tmp_path / 'whole', way, rule, calls)
    before = trained(tmp_path / 'killed', way, rule, calls, killed=killed)
    after = trained(tmp_path / 'killed', way, rule, calls)
    assert killed <= len(before) < calls and len(after) < calls and min(after) % 5 == 0
    assert [*curve] == [*range(calls)] and {*before, *after} == {*curve}
    assert len({*curve.values()}) > calls // 2
    for part in (before, after):
        np.testing.assert_allclose([*part.values()], [curve[i] for i in part], rtol=1e-5)
