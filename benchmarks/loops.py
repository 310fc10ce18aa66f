# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Loops as people write them: one training step of the SNN tutorial's pattern.

The learner is made inside the jitted step, its states are those of single samples under
``vmap_new_states``, the loop adds up gradients, and the optimiser follows. Or the loop is one of
Python, around a jitted step of the learner. Upstream and traceops run the same code; what differs
is ``traceops.enabled()``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import brainstate
import braintools
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import saiunit as u
from tqdm import tqdm

import traceops
from traceops.benchmarks import report
from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import TOLERANCE, check, compiled, data
from traceops.benchmarks.nets import make

__all__ = ['CASES', 'LoopCase', 'main', 'markdown', 'run']

COMPILE_BAR = 1.5


@dataclasses.dataclass(frozen=True)
class LoopCase:
    """One row.

    ``clip``: gradients are clipped at every step, so none can wait. ``by_hand``: the loop is
    Python's, the step is jitted. ``epochs``: of the loss curve. ``rounds``: at least so many
    are timed, where a ratio near 1 has to be told from noise.
    """

    name: str
    case: Case
    clip: bool = False
    by_hand: bool = False
    epochs: int = 0
    rounds: int = 1

    @property
    def bar(self) -> float:
        assert self.case.bar is not None
        return self.case.bar


def _case(rule: str, n: int, bar: float) -> Case:
    return Case(f'{rule} LIF {n}', 'lif', rule, n, bar, vmap=True)


CASES = (
    LoopCase('D-RTRL LIF 128', _case('D_RTRL', 128, 8.), epochs=200),
    LoopCase('ES-D-RTRL LIF 128', _case('ES_D_RTRL', 128, 1.3), epochs=200),
    LoopCase('D-RTRL LIF 1024', _case('D_RTRL', 1024, 40.)),
    LoopCase('D-RTRL LIF 128, clipped at every step', _case('D_RTRL', 128, 0.95), clip=True,
             rounds=40),
    LoopCase('ES-D-RTRL LIF 128, clipped at every step', _case('ES_D_RTRL', 128, 0.95), clip=True,
             rounds=40),
    LoopCase('D-RTRL LIF 128, step by hand', _case('D_RTRL', 128, 0.95), by_hand=True, rounds=40),
    LoopCase('ES-D-RTRL LIF 128, step by hand', _case('ES_D_RTRL', 128, 0.95), by_hand=True,
             rounds=40),
    LoopCase('D-RTRL LIF 1024, batch mode, step by hand', Case(
        'D-RTRL LIF 1024', 'lif', 'D_RTRL', 1024, 1.5, steps=10, batch=8), by_hand=True, rounds=5),
)


def train_step(one: LoopCase, nudged: bool = False) -> Callable[..., Any]:
    """``(inputs, labels) -> (loss, summed gradients)``; the weights move.

    ``nudged``: from initial weights that are the next larger numbers.
    """
    case = one.case
    brainstate.random.seed(0)
    model = make(case.net, case.n_in, case.n, case.n_out)
    weights = model.states(brainstate.ParamState)
    if nudged:
        for state in weights.values():
            state.value = jax.tree.map(lambda a: jnp.nextafter(a, jnp.inf), state.value)
    optimiser = braintools.optim.Adam(lr=1e-4)
    optimiser.register_trainable_weights(weights)

    def begin(inputs: Any, labels: Any) -> Callable[..., Any]:
        """A learner with new states: one step's gradients, and its loss."""
        learner = getattr(braintrace, case.rule)(model, **case.options)

        @brainstate.transform.vmap_new_states(state_tag='new', axis_size=case.batch)
        def init() -> None:
            brainstate.nn.init_all_states(model)
            learner.compile_graph(inputs[0, 0])

        if case.vmap:
            init()
        else:
            brainstate.nn.init_all_states(model, batch_size=case.batch)
            learner.compile_graph(inputs[0])
        lanes = brainstate.nn.Vmap(learner, vmap_states='new') if case.vmap else learner

        def loss_fn(x: Any) -> Any:
            out = lanes(x)
            loss = braintools.metric.softmax_cross_entropy_with_integer_labels(out, labels)
            return loss.mean(), out

        def gradients(x: Any) -> Any:
            grads, loss, _ = brainstate.transform.grad(
                loss_fn, weights, has_aux=True, return_value=True)(x)
            return brainstate.nn.clip_grad_norm(grads, 1.) if one.clip else grads, loss
        return gradients

    def end(grads: Any, losses: Any) -> Any:
        optimiser.update(brainstate.nn.clip_grad_norm(grads, 1.))
        return losses.mean(), grads

    @brainstate.transform.jit
    def step(inputs: Any, labels: Any) -> Any:
        gradients = begin(inputs, labels)

        def body(total: Any, x: Any) -> Any:
            grads, loss = gradients(x)
            return jax.tree.map(jnp.add, total, grads), loss

        zeros = jax.tree.map(jnp.zeros_like, weights.to_dict_values())
        return end(*brainstate.transform.scan(body, zeros, inputs))

    return _by_hand(begin, brainstate.transform.jit(end)) if one.by_hand else step


def _by_hand(begin: Callable[..., Any], end: Callable[..., Any]) -> Callable[..., Any]:
    """The same without a loop that is compiled; each call goes on from the states of the last."""
    made: list[Any] = []

    def step(inputs: Any, labels: Any) -> Any:
        if not made:
            made.append(brainstate.transform.jit(begin(inputs, labels)))
        total, losses = None, []
        for x in inputs:
            grads, loss = made[0](x)
            total = grads if total is None else _added(total, grads)
            losses.append(loss)
        return end(total, jnp.stack(losses))
    return step


@jax.jit
def _added(total: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, total, more)


def _compile_seconds(one: LoopCase, ways: dict[str, Any], rounds: int,
                     *args: Any) -> dict[str, float]:
    """From the loop to its program; a run, by which a first call is longer, can take far more."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name in [*ways] * rounds:
        with ways[name]():
            times[name].append(compiled(train_step(one), *args)[0])
    return {name: float(np.median(t)) for name, t in times.items()}


def run(one: LoopCase, repeats: int, progress: bool = True) -> dict[str, Any]:
    """Gradients, then loss curves, then times."""
    brainstate.environ.set(dt=1. * u.ms)
    x, y = data(one.case)
    tiny = dataclasses.replace(one.case, n=8, steps=2, batch=2)
    train_step(LoopCase('', tiny))(*data(tiny))     # imports and caches are nobody's compile time
    ways: dict[str, Any] = {'upstream': contextlib.nullcontext, 'traceops': traceops.enabled}
    steps, first, called = {}, {}, {}
    for name, way in ways.items():
        with way():
            steps[name] = train_step(one)
            start = time.perf_counter()
            first[name] = jax.block_until_ready(steps[name](x, y))
            called[name] = time.perf_counter() - start
    out: dict[str, Any] = {'name': one.name, 'bar': one.bar, 'error': '', 'curves': None,
                           'ratio': None, 'compile_ratio': None, 'seconds': {}}
    out['difference'] = check(first['upstream'][1], first['traceops'][1])
    if not out['difference'] <= TOLERANCE:
        out['error'] = f'gradients differ by {out["difference"]:.1e} (limit {TOLERANCE:.0e})'
        return out
    times: dict[str, list[float]] = {name: [] for name in ways}
    curves: dict[str, list[float]] = {name: [float(first[name][0])] for name in ways}
    rounds = max(repeats, one.rounds, one.epochs - 1)
    for _ in tqdm(range(rounds), desc=one.name, disable=not progress,
                  leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            loss, _ = jax.block_until_ready(step(x, y))
            times[name].append(time.perf_counter() - start)
            curves[name].append(float(loss))
    out['seconds'] = {name: float(np.median(t)) for name, t in times.items()}
    alone = {name: called[name] - out['seconds'][name] for name in ways} if one.by_hand else \
        _compile_seconds(one, ways, min(3, repeats), x, y)
    out['compile_ratio'] = alone['traceops'] / alone['upstream']
    out['ratio'] = out['seconds']['upstream'] / out['seconds']['traceops']
    if one.epochs:
        nudged = train_step(one, nudged=True)
        curves['nudged'] = [float(nudged(x, y)[0]) for _ in curves['upstream']]
        a, b, c = map(np.array, curves.values())
        out['curves'] = {'epochs': len(a), 'first': a[0], 'last': a[-1],
                         'difference': float(np.abs(b / a - 1).max()),
                         'nudged': float(np.abs(c / a - 1).max())}
    return out


_HEAD = ('loop', 'upstream ms', 'traceops ms', 'upstream / traceops', 'gradients differ by',
         'compile', 'loss curves')


def _cells(f: dict[str, Any]) -> list[str]:
    if f['error']:
        return [f['name'], f'REFUSED: {f["error"]}', *[''] * (len(_HEAD) - 2)]
    met = 'met' if f['ratio'] >= f['bar'] else 'MISSED'
    late = '' if f['compile_ratio'] <= COMPILE_BAR else f' (MISSED {COMPILE_BAR:g})'
    c = f['curves']
    curves = '-' if c is None else (f'{c["epochs"]} epochs, {c["first"]:.3f} to {c["last"]:.3f}, '
                                    f'differ by {c["difference"]:.1e} (upstream from weights '
                                    f'one rounding off: {c["nudged"]:.1e})')
    return [f['name'], *(f'{f["seconds"][who] * 1e3:.1f}' for who in ('upstream', 'traceops')),
            f'{f["ratio"]:.2f}x ({met} {f["bar"]:g})', f'{f["difference"]:.1e}',
            f'{f["compile_ratio"]:.2f}{late}', curves]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for a README."""
    return report.markdown(rows, _HEAD, _cells)


def main(cases: list[LoopCase], repeats: int) -> list[dict[str, Any]]:
    """Measure, print the table, return the figures."""
    return report.each(cases, lambda one: run(one, repeats), _HEAD, _cells)
