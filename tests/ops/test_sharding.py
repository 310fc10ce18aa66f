# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Sharded operands on eight devices of the host: nothing is gathered, the results are the same.

jax decides how many devices there are when it starts: the cases run in a process of their own.
"""

import functools
import itertools
import json
import os
import re
import subprocess
import sys

LAYOUTS = [('b', None, None), (None, 'i', None), (None, None, 'o'), ('b', None, 'o'),
           ('b', 'i', 'o')]


def _cases():
    """Of every operation: a function, its operands, and the axes of each (t, s: whole)."""
    from tests.ops import suites
    from traceops import ops
    T, B, I, O, S = 3, 4, 6, 8, 2  # noqa: E741
    scan = suites.AdjointWindowSuite().operands(place=(B, O), T=T, R=1)
    yield ('adjoint_window', lambda L, D, f: ops.adjoint_window(L, D, [f], kappa=.5), scan,
           ('tbos', 'tboss', 'tbos'), ('tbo', 'bos', 'bos'))
    suite = suites.EsTraceWindowSuite()
    yield ('es_trace_window', suite.call, suite.operands(place=(B, O), T=T),
           ('tbos', 'tboss', 'tbos', 'bos', 't'), ('tbo', 'bo', 'bos'))
    yield ('d_trace_window', suites.DTraceWindowSuite().call,
           suites.DTraceWindowSuite().operands(S, T=T, B=B, I=I, O=O),
           ('bios', 'tbi', 'tbos', 'boss', 'bos'), ('bios', 'io'))
    yield ('trace_gradient', suites.TraceGradientSuite().call,
           suites.TraceGradientSuite().operands(T=T, B=B, I=I, O=O), ('tbi', 'tbo', 'io'), ('io',))
    # spikes are counted where a device is alone; the rows of a sparse matrix would be gathered
    yield ('events', functools.partial(ops.trace_gradient, events=True),
           suites.TraceGradientSuite().operands(T=T, B=B, I=I, O=O)[:2], ('tbi', 'tbo'), ('io',))


def _try_all():
    """Print a line for every operation, layout and way: what was sent, and how far off it is."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from traceops.kernels.trace_gradient import events
    events._WORK = events._WIDTH = 0
    mesh = jax.make_mesh((2, 2, 2), ('b', 'i', 'o'),
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)
    for name, fn, operands, axes, results in _cases():
        want = jax.tree.leaves(fn(*operands))
        for layout in LAYOUTS:
            place = dict(zip('bio', layout, strict=True))
            spec = lambda names: P(*(place.get(n) for n in names))  # noqa: B023, E731
            specs = tuple(map(spec, axes))
            flat = lambda *a: tuple(jax.tree.leaves(fn(*a)))  # noqa: B023, E731

            def local(*a):
                if name == 'trace_gradient' and place['b']:  # noqa: B023
                    a = (*a[:2], a[2] / mesh.shape['b'])
                out = list(flat(*a))  # noqa: B023
                for k, names in enumerate(results):  # noqa: B023
                    if 'b' not in names and place['b']:  # noqa: B023
                        out[k] = jax.lax.psum(out[k], 'b')
                return tuple(out)
            ways = {'jit': jax.jit(flat, out_shardings=tuple(
                NamedSharding(mesh, spec(r)) for r in results)),
                'shard_map': jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs,
                                                   out_specs=tuple(map(spec, results))))}
            given = [jax.device_put(a, NamedSharding(mesh, s))
                     for a, s in zip(operands, specs, strict=True)]
            for way, run in ways.items():
                text = run.lower(*given).compile().as_text()
                sent = sorted({kind for kind in (
                    'all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute',
                    'all-to-all') if re.search(rf'\b{kind}(-start)?\(', text)})
                worst = float(np.max([np.linalg.norm(np.asarray(a) - np.asarray(b))
                                      / np.linalg.norm(np.asarray(b))
                                      for a, b in zip(run(*given), want, strict=True)]))
                print(json.dumps([name, list(layout), way, sent, worst]))


def _tried():
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': os.environ.get('XLA_FLAGS', '')
           + ' --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
             ' --xla_llvm_disable_expensive_passes=true'}
    done = subprocess.run([sys.executable, '-c', 'from tests.ops.test_sharding import _try_all\n'
                           '_try_all()'], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('[')]


def test_nothing_is_gathered():
    """All of them in one test: they share a process, which takes longer than they do."""
    rows, wrong = _tried(), []
    for name, layout, way, sent, worst in rows:
        sums = name in ('d_trace_window', 'trace_gradient', 'events') and 'b' in layout
        if sent != (['all-reduce'] if sums else []) or not worst < 1e-6:
            wrong.append((name, layout, way, sent, worst))
    assert not wrong
    names = ('adjoint_window', 'es_trace_window', 'd_trace_window', 'trace_gradient', 'events')
    assert {(name, tuple(layout), way) for name, layout, way, *_ in rows} == set(
        itertools.product(names, LAYOUTS, ('jit', 'shard_map')))
