# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""jax's compilation cache on disk serves the programs of a second process."""

import os
import subprocess
import sys

_TRAIN = '''
import collections, jax
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))

import brainstate, braintrace, traceops
traceops.install()
brainstate.random.seed(0)

class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = braintrace.nn.GRUCell(3, 4), braintrace.nn.Linear(4, 2)

    def update(self, x):
        return self.out(self.rnn(x))

xs = brainstate.random.randn(12, 2, 3)
learner = braintrace.compile(Net(), 'D_RTRL', xs[0], batch_size=2)

@brainstate.transform.jit
def train(xs):
    brainstate.nn.reset_all_states(learner, batch_size=2)
    learner.etrace_evolve(xs[:5])
    return learner.etrace_grad(xs[5:], step_fn=lambda x: (learner(x) ** 2).mean())

events.clear()
grads = jax.block_until_ready(train(xs))
print(events['/jax/compilation_cache/cache_hits'], events['/jax/compilation_cache/cache_misses'],
      *(float(abs(g).sum()) for g in jax.tree.leaves(grads)))
'''


def test_a_second_process_compiles_nothing_anew(tmp_path):
    flags = ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'

    def process():
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', _TRAIN], check=True, text=True,
            stdout=subprocess.PIPE, env={**os.environ, 'JAX_PLATFORMS': 'cpu',
                                         'XLA_FLAGS': os.environ.get('XLA_FLAGS', '') + flags,
                                         'JAX_COMPILATION_CACHE_DIR': str(tmp_path)})
        hits, misses, *sums = done.stdout.split()
        return int(hits), int(misses), sums

    _, missed, first = process()
    hit, again, second = process()
    assert missed > 0 and again == 0 and hit >= missed
    assert first == second and max(map(float, first)) > 0
