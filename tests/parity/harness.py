# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Drive upstream and traceops the same way and compare everything they leave behind."""

from __future__ import annotations

import dataclasses
from typing import Any

import brainstate
import braintrace
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

import traceops
from tests.parity.nets import Net

BATCH = 4
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    'd_rtrl': (braintrace.D_RTRL, {}),
    'es': (braintrace.ES_D_RTRL, {'decay_or_rank': 0.9}),
    'es-rank': (braintrace.ES_D_RTRL, {'decay_or_rank': 5}),
    'es-pair': (braintrace.ES_D_RTRL, {'decay_or_rank': (0.5, 0.9)}),
    'es-zero': (braintrace.ES_D_RTRL, {'decay_or_rank': 0.}),
    'eprop': (braintrace.EProp, {'kappa_filter_decay': 0.7}),
    'eprop-random': (braintrace.EProp, {'feedback': 'random'}),
    'ostl': (braintrace.OSTLRecurrent, {}),
    'ostl-ff': (braintrace.OSTLFeedforward, {}),
    'three-factor': (braintrace.ThreeFactor, {'modulator': 0.3}),
}


@dataclasses.dataclass
class Run:
    """A learner on its way."""

    learner: Any
    model: Any
    x: Any
    y: Any

    @property
    def inner(self) -> Any:
        return getattr(self.learner, 'module', self.learner)

    def loss(self, x: Any, y: Any) -> Any:
        return ((self.learner(x) - y) ** 2).mean()

    def grad(self, **options: Any) -> Any:
        """``etrace_grad`` in a program of its own, as people run it."""
        return brainstate.transform.jit(lambda: self.eager_grad(**options))()

    def program(self, **options: Any) -> Any:
        """That program, to be called again: states are of the type that a call leaves."""
        for state in (*self.model.states().values(), self.inner.running_index):
            state.value = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(a)), state.value)
        return brainstate.transform.jit(lambda: self.eager_grad(**options))

    def eager_grad(self, **options: Any) -> Any:
        """The same operation by operation."""
        options.setdefault('return_value', True)
        return self.learner.etrace_grad(self.x, self.y, step_fn=self.loss, **options)

    def states(self) -> dict[str, Any]:
        """Everything a following call could see."""
        inner = self.inner
        traces = [st.value for name in ('etrace_bwg', '_trace_filters', 'etrace_xs', 'etrace_dfs')
                  for st in getattr(inner, name, {}).values()]
        return {'model': {str(k): v.value for k, v in self.model.states().items()},
                'traces': traces, 'index': inner.running_index.value}


def start(compiler: Any, net: Net, rule: str, steps: int, vmap: bool = False, *,
          batched: bool = True, **options: Any) -> Run:
    """A learner from seed 0 and its data."""
    brainstate.random.seed(0)
    model = net.make()
    # an initialiser's weakly typed zeros would have upstream return a float32 gradient when the
    # float64 sum is divided by its float32 mask
    for state in model.states(brainstate.ParamState).values():
        state.value = jax.tree.map(lambda a: jnp.asarray(a, a.dtype), state.value)
    x = net.inputs(steps, BATCH)
    y = jnp.asarray(np.random.RandomState(5).randn(steps, BATCH, 2), float)
    cls, more = RULES[rule]
    if rule == 'eprop-random':
        more = {**more, 'random_feedback_key': brainstate.random.split_key()}
    if not batched:
        x, y = x[:, 0], y[:, 0]
    learner = compiler(model, cls, x[0], batch_size=BATCH if batched else None, vmap=vmap, **more,
                       **options)
    return Run(learner, model, x, y)


def pair(net: Net, rule: str, steps: int, vmap: bool = False, **settings: Any) -> tuple[Run, Run]:
    """The same learner upstream and here; asked for the window, where upstream's way is as fast."""
    if settings.get('window') is None and 'memory_budget' not in settings:
        settings['window'] = steps
    upstream = start(braintrace.compile, net, rule, steps, vmap)
    with traceops.configured(**settings):
        ours = start(traceops.compile, net, rule, steps, vmap)
    return upstream, ours


def programs(*runs: Run) -> Any:
    """``grad`` of each run as one program, which is traced and compiled for its first call."""
    made = {run.learner: run.program() for run in runs}
    return lambda run: made[run.learner]()


def assert_close(want: Any, got: Any, tolerance: float, nonzero: bool = False) -> None:
    """Equal structure, dtypes, and values leaf by leaf (by norm)."""
    a, ta = jax.tree.flatten(want)
    b, tb = jax.tree.flatten(got)
    assert ta == tb
    for p, q in zip(a, b, strict=True):
        p, q = np.asarray(p), np.asarray(q)
        assert p.dtype == q.dtype and p.shape == q.shape, (p.dtype, q.dtype, p.shape, q.shape)
        norm = np.linalg.norm(p.astype(float))
        error = np.linalg.norm(p.astype(float) - q.astype(float))
        assert error <= tolerance * max(norm, 1e-3 if norm == 0 else norm), (error, norm)
    if nonzero:
        assert sum(np.linalg.norm(np.asarray(p)) > 0 for p in a) > 0
        assert max(np.linalg.norm(np.asarray(p, float)) for p in a) > 1e-8


def assert_same_states(want: Run, got: Run, tolerance: float) -> None:
    """States, traces, filters and running index agree."""
    a, b = want.states(), got.states()
    for name in ('model', 'index'):
        assert_close(a[name], b[name], tolerance)
    assert len(a['traces']) == len(b['traces']) > 0
    for p, q in zip(a['traces'], b['traces'], strict=True):
        assert_close(p, q, tolerance)


def jitted(call: Any) -> Any:
    """The same call of a run as one program: compiled once, not operation by operation."""
    return lambda run: brainstate.transform.jit(lambda: call(run))()


def both(upstream: Run, ours: Run, call: Any) -> tuple[Any, Any]:
    """Call one after the other from the same random key, and compare the keys after."""
    brainstate.random.seed(11)
    a = call(upstream)
    key = _key()
    brainstate.random.seed(11)
    b = call(ours)
    np.testing.assert_array_equal(key, _key())
    return a, b


def _key() -> Any:
    return np.asarray(jax.random.key_data(brainstate.random.DEFAULT.value))


def added_up(run: Run) -> Any:
    """Gradients of single steps, added up in a loop written by hand."""
    weights = run.inner.param_states

    def body(total: Any, now: Any) -> Any:
        grads = brainstate.transform.grad(lambda: run.loss(*now), weights)()
        return jax.tree.map(jnp.add, total, grads), None
    zeros = {k: jax.tree.map(jnp.zeros_like, w.value) for k, w in weights.items()}
    return brainstate.transform.scan(body, zeros, (run.x, run.y))[0]


def compiled(fn: Any, *avals: Any) -> Any:
    """The XLA program of a function of states and arrays."""
    closed, states = brainstate.transform.make_jaxpr(fn)(*avals)
    values = jax.tree.leaves([s.value for s in states])
    return jax.jit(jax.extend.core.jaxpr_as_fun(closed)).lower(*avals, *values).compile()
