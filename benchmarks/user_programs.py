# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Training programs as people write them: one row each, with what it is to reach.

Upstream and traceops run the same code; what differs is ``traceops.enabled()``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
from collections.abc import Callable
from typing import Any

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import saiunit as u

import traceops
from traceops.benchmarks import report
from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import (
    TOLERANCE,
    check,
    compiled,
    data,
    of_case,
    online,
    simulation,
)
from traceops.benchmarks.nets import make

__all__ = ['HEAD', 'PROGRAMS', 'Program', 'cells', 'main', 'markdown', 'run', 'whole']

#: ``figure -> (unit, scale, whether the bar is a limit)``: else it is upstream / traceops.
FIGURES = {
    'time': ('ms', 1e3, False), 'CPU time': ('ms', 1e3, False), 'compile': ('s', 1., True),
    'learning / forward': ('ms', 1e3, True), 'page faults': ('', 1., True)}


@dataclasses.dataclass(frozen=True)
class Program:
    """One row.

    ``figure``: of :data:`FIGURES`. ``bar``: upstream / traceops at least; for a compile time,
    traceops / upstream at most; for learning / forward that at most; for page faults, so many a
    call at most. ``warm_up``: of the steps of the case, those without a loss. ``rounds``: at least.
    """

    name: str
    case: Case
    build: Callable[[Program], Callable[..., Any]]
    bar: float
    figure: str = 'time'
    warm_up: int = 0
    carry: bool = True
    rounds: int = 1


class _Signed(brainstate.nn.Module):
    """Two states a neuron, and weights of a fixed sign."""

    layer: Any = braintrace.nn.SignedWLinear

    def __init__(self, n_in: int, n: int, n_out: int) -> None:
        super().__init__()
        self.n = n
        self.ff, self.rec = (self.layer(i, n) for i in (n_in, n))
        self.out = braintrace.nn.LeakyRateReadout(n, n_out, tau=10. * u.ms)

    def init_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        shape = (self.n,) if batch_size is None else (batch_size, self.n)
        self.g, self.v = (brainstate.HiddenState(jnp.zeros(shape)) for _ in range(2))

    def update(self, x: Any) -> Any:
        g, v = self.g.value, self.v.value
        self.g.value = 0.8 * g + 0.01 * self.ff(x) - 0.01 * self.rec(v)
        self.v.value = 0.9 * v + 0.1 * jnp.tanh(self.g.value - v)
        return self.out(self.v.value)


def _unit(weight: Any) -> Any:
    return weight / jnp.linalg.norm(weight, axis=0)


class _Normalised(_Signed):
    """Weights that the op normalises: their trace has no closed form over a window."""

    @staticmethod
    def layer(n_in: int, n: int) -> Any:
        layer = braintrace.nn.SignedWLinear(n_in, n)
        layer.update = lambda x: 5. * braintrace.matmul(x, layer.weight.value, weight_fn=_unit)
        return layer


def _net(case: Case) -> Any:
    brainstate.random.seed(0)
    sizes = case.n_in, case.n, case.n_out
    own = {'signed': _Signed, 'normalised': _Normalised}
    return own[case.net](*sizes) if case.net in own else make(case.net, *sizes)


def _loop(one: Program) -> Callable[..., Any]:
    """A loop written by hand over the steps of a batch, after others that only look."""
    case, net = one.case, _net(one.case)
    brainstate.nn.init_all_states(net, batch_size=case.batch)
    options = {**case.options, **({} if one.warm_up else {'vjp_method': 'multi-step'})}
    learner = getattr(braintrace, case.rule)(net, **options)
    learner.compile_graph(data(case)[0][0])
    weights = learner.param_states

    def call(x: Any, y: Any) -> Any:
        brainstate.nn.init_all_states(net, batch_size=case.batch)
        learner.reset_state(batch_size=case.batch)
        if one.warm_up:
            brainstate.transform.for_loop(lambda i: learner(i), x[:one.warm_up])

        def step(total: Any, i: Any) -> Any:
            grads = brainstate.transform.grad(lambda: _loss(learner(i), y), weights)()
            return jax.tree.map(jnp.add, total, grads), None
        zeros = {k: jax.tree.map(jnp.zeros_like, w.value) for k, w in weights.items()}
        return brainstate.transform.scan(step, zeros, x[one.warm_up:])[0]
    return call


def _prefix(one: Program) -> Callable[..., Any]:
    """``etrace_evolve`` over the first steps, ``etrace_grad`` over the others."""
    case, net = one.case, _net(one.case)

    def call(x: Any, y: Any) -> Any:
        learner = braintrace.compile(net, case.rule, x[0], batch_size=case.batch, vmap=case.vmap,
                                     **case.options)
        learner.etrace_evolve(x[:one.warm_up])
        return learner.etrace_grad(x[one.warm_up:], step_fn=lambda i: _loss(
            learner(i), None if case.vmap else y), reduction='sum')
    return call


def whole(one: Program) -> Callable[..., Any]:
    """One ``etrace_grad`` over all steps, the learner's states going on from call to call."""
    settings = {} if one.carry else {'carry_trace': False}
    call = online(of_case(one.case), braintrace.compile, **settings)
    return lambda x, y: call(x, y)[0]


def _loss(out: Any, y: Any) -> Any:
    if y is None:
        return (out ** 2).mean()
    return -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], -1).mean()


def _lif(rule: str, n: int, **sizes: Any) -> Case:
    return Case(f'{rule} LIF {n}', 'lif', rule, n, None, **sizes)


_GRU = Case('GRU 64', 'gru', 'D_RTRL', 64, None, batch=16, n_in=20, n_out=2)
_WARM = {'steps': 200, 'batch': 16, 'n_in': 100, 'n_out': 2}
_LARGE = _lif('D_RTRL', 1024)

PROGRAMS = (
    Program('D-RTRL GRU 64, multi-step, loop by hand', _GRU, _loop, 4., rounds=20),
    Program('D-RTRL LIF 200, 150 steps of warm-up and 50 of training',
            _lif('D_RTRL', 200, **_WARM), _loop, 20., warm_up=150),
    Program('ES-D-RTRL LIF 200, 150 steps of warm-up and 50 of training',
            _lif('ES_D_RTRL', 200, **_WARM), _loop, 2.3, warm_up=150, rounds=20),
    *(Program(f'D-RTRL {net} weights, evolve and grad, vmap', Case(
        net, net, 'D_RTRL', 60, None, steps=255, batch=16, n_in=100, n_out=2, vmap=True),
        _prefix, 50., warm_up=205) for net in ('signed', 'normalised')),
    Program('D-RTRL GRU 64, evolve and grad', dataclasses.replace(
        _GRU, steps=30, batch=32, n_in=10, n_out=10), _prefix, 1.3, 'compile', warm_up=20,
        rounds=3),
    *(Program(f'ES-D-RTRL LIF 128, B = {B}', _lif('ES_D_RTRL', 128, batch=B), whole, 1.2,
              'CPU time', rounds=40) for B in (1, 256)),
    Program('D-RTRL LIF 1024, carried', _LARGE, whole, 150.),
    Program('D-RTRL LIF 1024, carried', _LARGE, whole, 2., 'learning / forward', rounds=10),
    # a tenth of what a call had on average when they were first counted (eight calls: 0 to 9199)
    Program('D-RTRL LIF 1024, not carried', _LARGE, whole, 217., 'page faults', carry=False,
            rounds=20),
)


def run(one: Program, repeats: int) -> dict[str, Any]:
    """Gradients, then the figure: ``upstream`` and ``traceops`` (or what it is compared with)."""
    brainstate.environ.set(dt=1. * u.ms)
    x, y = data(one.case)
    out: dict[str, Any] = {'name': one.name, 'figure': one.figure, 'bar': one.bar, 'error': '',
                           'value': None, 'upstream': None, 'traceops': None}
    ways: dict[str, Any] = {'upstream': contextlib.nullcontext, 'traceops': traceops.enabled}
    calls, grads = {}, {}
    for name, way in ways.items():
        with way():
            calls[name] = brainstate.transform.jit(one.build(one))
            grads[name] = jax.block_until_ready(calls[name](x, y))
    out['difference'] = check(grads['upstream'], grads['traceops'])
    if not out['difference'] <= TOLERANCE:
        out['error'] = f'gradients differ by {out["difference"]:.1e} (limit {TOLERANCE:.0e})'
        return out
    del grads
    if one.figure == 'learning / forward':
        simulate = brainstate.transform.jit(simulation(of_case(one.case)))
        calls = {'upstream': simulate, 'traceops': calls['traceops']}
        out['compared with'] = 'simulation alone'
    found = _figures(one, calls, ways, (x, y), max(repeats, one.rounds))
    out.update(found)
    a, b = found['upstream'], found['traceops']
    out['value'] = b if one.figure == 'page faults' else b / a if FIGURES[one.figure][2] else a / b
    return out


def _figures(one: Program, calls: dict[str, Any], ways: dict[str, Any], args: Any,
             rounds: int) -> dict[str, float]:
    """Medians, in turn; of two calls in a row the second counts, as in a training loop.

    Of page faults the mean: few calls have most of them.
    """
    middle = np.mean if one.figure == 'page faults' else np.median
    found: dict[str, list[float]] = {name: [] for name in calls}
    if one.figure == 'page faults':
        calls = {'traceops': calls['traceops']}
    for _ in range(rounds):
        for name, call in calls.items():
            if one.figure == 'compile':
                with ways[name]():
                    found[name].append(compiled(one.build(one), *args)[0])
                continue
            read = {'CPU time': time.process_time, 'page faults': _faults}.get(
                one.figure, time.perf_counter)
            if one.rounds > 1:          # else a call takes long
                jax.block_until_ready(call(*args))
            start = read()
            jax.block_until_ready(call(*args))
            found[name].append(read() - start)
    return {name: float(middle(v)) if v else 0. for name, v in found.items()}


def _faults() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def met(f: dict[str, Any]) -> bool:
    """Whether a row reaches its bar."""
    return bool(f['value'] <= f['bar'] if FIGURES[f['figure']][2] else f['value'] >= f['bar'])


HEAD = ('program', 'figure', 'upstream', 'traceops', 'value', 'gradients differ by')


def cells(f: dict[str, Any]) -> list[str]:
    if f['error']:
        return [f['name'], f['figure'], f'REFUSED: {f["error"]}', *[''] * (len(HEAD) - 3)]
    unit, scale, limit = FIGURES[f['figure']]
    a, b = (f'{f[who] * scale:.{2 if unit == "s" else 1}f}' for who in ('upstream', 'traceops'))
    if f['figure'] == 'page faults':
        a, b = '-', f'{f["traceops"]:.0f}'
    what = {'compile': ' of upstream\'s', 'learning / forward': ' of simulation alone',
            'page faults': ' a call'}.get(f['figure'], 'x')
    value = f'{f["value"]:.0f}' if f['figure'] == 'page faults' else f'{f["value"]:.2f}'
    if f['figure'] == 'learning / forward':
        a = f'- (forward {a})'
    return [f['name'], f'{f["figure"]}{f" ({unit})" if unit else ""}', a, b,
            f'{value}{what} ({"met" if met(f) else "MISSED"}{" at most" if limit else ""} '
            f'{f["bar"]:g})', f'{f["difference"]:.1e}']


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for a README."""
    return report.markdown(rows, HEAD, cells)


def main(programs: list[Program], repeats: int) -> list[dict[str, Any]]:
    """Measure, print the table, return the figures."""
    return report.each(programs, lambda one: run(one, repeats), HEAD, cells)
