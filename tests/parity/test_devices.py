# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Samples spread over devices: one reduction a window, nothing gathered, for nets and rules.

jax decides how many devices there are when it starts: the cases run in a process of their own.
"""

import json
import os
import subprocess
import sys

import pytest

CASES = {'lif': (('es', False), ('d_rtrl', True)), 'lora': (('d_rtrl', True),),
         'embedding': (('es', False),)}


def _try_all(*names):
    """Print what the program of every net, rule and mode sends; results are those of one device."""
    import brainstate
    import jax
    import jax.numpy as jnp
    import numpy as np
    import saiunit as u
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import traceops
    from tests.parity import harness
    from tests.parity.nets import NETS as ALL
    from traceops.benchmarks import hlo
    brainstate.environ.set(dt=1. * u.ms)
    mesh = Mesh(np.asarray(jax.devices()), ('samples',))

    def put(a, *axes):
        return jax.device_put(jnp.asarray(a), NamedSharding(mesh, PartitionSpec(*axes)))

    def by_sample(a):
        return put(a, *['samples'] * (np.shape(a)[:1] == (harness.BATCH,)))

    for name in names:
        for rule, vmap in CASES[name]:
            with traceops.configured(window=3):
                alone, run = (harness.start(traceops.compile, ALL[name], rule, 9, vmap)
                              for _ in range(2))
            want = alone.grad()
            weights = {id(s) for s in run.model.states(brainstate.ParamState).values()}
            for state in brainstate.graph.states(run.learner).values():
                state.value = jax.tree.map(
                    put if id(state) in weights else by_sample, state.value)
            run.x, run.y = put(run.x, None, 'samples'), put(run.y, None, 'samples')
            program = brainstate.transform.jit(
                lambda x, y, run=run: run.learner.etrace_grad(
                    x, y, step_fn=run.loss, return_value=True))
            text = program.compile(run.x, run.y).as_text()
            sent = hlo.exchanges(hlo.kernels(text, 1e9))
            harness.assert_close(want, program(run.x, run.y), 1e-5, nonzero=True)
            size = sum(a.nbytes for a in jax.tree.leaves(want[0]))
            [said] = [n for n in traceops.explain(run.learner).notes if ' devices' in n]
            print(json.dumps([
                name, rule, vmap, sorted({k.operation for k in sent}), sum(k.times for k in sent),
                max(k.written for k in sent), size, said]))


@pytest.mark.parametrize('names', [
    ('lif',), pytest.param(('lora', 'embedding'), marks=pytest.mark.slow)], ids=str)
def test_one_reduction_a_window_and_nothing_gathered(names):
    flags = (' --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
             ' --xla_llvm_disable_expensive_passes=true')
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu',
           'XLA_FLAGS': os.environ.get('XLA_FLAGS', '') + flags}
    done = subprocess.run(
        [sys.executable, '-c', 'from tests.parity.test_devices import _try_all\n'
         f'_try_all(*{names})'],
        capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('[')]
    assert [tuple(row[:3]) for row in rows] == [
        (name, *case) for name in names for case in CASES[name]]
    for name, rule, vmap, kinds, times, most, size, said in rows:
        case = name, rule, vmap
        assert kinds == ['all-reduce'] and times == 3, (case, kinds, times)
        # the gradients, the losses of the window, and what an entering trace adds to them
        assert most <= 2 * size + 64, (case, most, size)
        assert said.startswith('samples on 4 devices; one reduction of '), said
