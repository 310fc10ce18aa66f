# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Who is compared: the same net, data and loss, learned in five ways.

Each contestant has a net of its own, made from the same seed. Its states (and its trace, where
one is carried) go on from call to call, as in a training loop: were they made inside the
compiled call, the compiler would drop the trace that nobody reads afterwards, and carrying it
would look free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import brainstate
import braintools
import braintrace
import jax.numpy as jnp
import numpy as np

import traceops
from traceops.benchmarks import nets
from traceops.benchmarks.cases import Case

__all__ = ['Contestant', 'data', 'enter', 'spikes_per_neuron', 'upstream_bytes']


@dataclasses.dataclass
class Contestant:
    """``call(inputs, labels) -> (gradients or None, mean loss)``, compiled by nobody yet."""

    call: Callable[..., Any]
    learner: Any = None

    @property
    def engine(self) -> str:
        """Which engine served the last call."""
        if self.learner is None:
            return ''
        return '+'.join(sorted({row.engine for row in traceops.explain(self.learner).rows}))

    @property
    def learned(self) -> set[str]:
        """Paths of the weights that the rule learns, such as ``rnn.Wz.weight``."""
        if self.learner is None:
            return set()
        return {row.parameter for row in traceops.explain(self.learner).rows}


def data(case: Case) -> tuple[Any, Any]:
    """Inputs ``[T, B, n_in]``, strong enough that spiking nets spike, and labels ``[B]``."""
    rng = np.random.RandomState(0)
    x = rng.binomial(1, 0.2, (case.steps, case.batch, case.n_in)).astype(np.float32)
    y = rng.randint(0, case.n_out, case.batch)
    return jnp.asarray(x * (20. if case.spiking else 1.)), jnp.asarray(y)


def enter(case: Case, who: str) -> Contestant:
    """Make a contestant: ``upstream``, ``traceops``, ``free``, ``bptt`` or ``forward``."""
    if who == 'upstream':
        return _online(case, braintrace.compile)
    if who in ('traceops', 'free'):
        with traceops.configured(carry_trace=who == 'traceops', window=case.window):
            return _online(case, traceops.compile)
    return _offline(case, learning={'bptt': True, 'forward': False}[who])


def _net(case: Case) -> Any:
    brainstate.random.seed(0)
    return nets.make(case.net, case.n_in, case.n, case.n_out)


def _loss(out: Any, y: Any) -> Any:
    return braintools.metric.softmax_cross_entropy_with_integer_labels(out, y).mean()


def _online(case: Case, compiler: Callable[..., Any]) -> Contestant:
    model, example = _net(case), data(case)[0][0]
    learner = compiler(model, case.rule, example, batch_size=case.batch, vmap=case.vmap,
                       **case.options)
    weights = model.states(brainstate.ParamState)

    def call(inputs: Any, labels: Any) -> Any:
        return learner.etrace_grad(
            inputs, step_fn=lambda x: _loss(learner(x), labels), weights=weights,
            return_value=True, loss_output='scalar')
    return Contestant(call, learner)


def _offline(case: Case, learning: bool) -> Contestant:
    model = _net(case)
    brainstate.nn.init_all_states(model, batch_size=case.batch)
    weights = model.states(brainstate.ParamState)

    def simulate(inputs: Any, labels: Any) -> Any:
        return brainstate.transform.for_loop(lambda x: _loss(model(x), labels), inputs).mean()

    def bptt(inputs: Any, labels: Any) -> Any:
        return brainstate.transform.grad(
            lambda: simulate(inputs, labels), weights, return_value=True)()
    return Contestant(bptt if learning else lambda x, y: (None, simulate(x, y)))


def spikes_per_neuron(case: Case) -> float:
    """Spikes of a neuron in one sequence, on average, in the layer that spikes least."""
    model = _net(case)

    @brainstate.transform.jit
    def count(inputs: Any) -> Any:
        brainstate.nn.init_all_states(model, batch_size=case.batch)

        def step(x: Any) -> Any:
            model(x)
            return jnp.stack([layer.get_spike().mean() for layer in model.spiking_layers])
        return brainstate.transform.for_loop(step, inputs).sum(0)
    return float(count(data(case)[0]).min())


def upstream_bytes(case: Case) -> int:
    """What upstream's training call would need, from its compiled program; nothing is run.

    The learner is made inside the call here, so that its trace is never allocated.
    """
    def call(inputs: Any, labels: Any) -> Any:
        return _online(case, braintrace.compile).call(inputs, labels)
    return program_bytes(brainstate.transform.jit(call).lower(*data(case)).compile())


def program_bytes(compiled: Any) -> int:
    """Arguments, results and temporaries of a compiled call."""
    stats = compiled.memory_analysis()
    return (stats.argument_size_in_bytes + stats.output_size_in_bytes
            + stats.temp_size_in_bytes - stats.alias_size_in_bytes)
