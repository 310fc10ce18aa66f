# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Contestants, their check against upstream, and interleaved timing."""

from __future__ import annotations

import dataclasses
import gc
import resource
import time
from collections.abc import Callable, Collection
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
from traceops.benchmarks.cases import Case
from traceops.benchmarks.nets import make

__all__ = ['Row', 'Training', 'bptt', 'check', 'compiled', 'contestants', 'cross_entropy', 'data',
           'evolution', 'interleaved', 'jitted', 'of_case', 'online', 'run', 'simulation']

TOLERANCE = 1e-5

#: Seconds of a round up to which another one is taken to find how many there should be.
_QUICK = 20.
#: Seconds of a call up to which what the call before it left behind is seen in its time.
_SHORT = 1.
#: Programs of each that are compiled, at least: their times scatter more than those of calls.
_COMPILED = 9


@dataclasses.dataclass
class Row:
    """What was measured of a case; ``error`` refuses the speed.

    ``memory``: bytes of the arguments (states, trace) and temporaries of a call's program.
    ``peak_memory``: bytes at most in use, of the GPU where there is one, else of the process.
    """

    case: Case
    difference: float | None = None
    spikes: float | None = None
    error: str = ''
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    peak_memory: int = 0

    def median(self, who: str) -> float | None:
        times = self.seconds.get(who)
        return float(np.median(times)) if times else None

    def ratio(self, above: str, below: str) -> float | None:
        a, b = self.median(above), self.median(below)
        return a / b if a is not None and b is not None else None


def data(case: Case) -> tuple[Any, Any]:
    """Inputs strong enough that spiking nets spike, and labels."""
    rng = np.random.RandomState(0)
    x = rng.binomial(1, 0.2, (case.steps, case.batch, case.n_in)).astype(np.float32)
    y = rng.randint(0, case.n_out, case.batch)
    return jnp.asarray(x * (case.drive if case.spiking else 1.)), jnp.asarray(y)


def cross_entropy(out: Any, y: Any) -> Any:
    """Of the output of a step, and labels."""
    return braintools.metric.softmax_cross_entropy_with_integer_labels(out, y).mean()


@dataclasses.dataclass
class Training:
    """A net and how it is trained: what ``braintrace.compile`` takes, inputs, and a loss.

    Attributes
    ----------
    model : brainstate.nn.Module
    algorithm : str or type
    inputs : array, ``[T, ...]``
    loss : callable
        ``(output of a step, targets) -> scalar``.
    targets : pytree of arrays
        Given whole to every step.
    options : dict
        Of ``braintrace.compile``, ``batch_size`` among them.
    """

    model: Any
    algorithm: Any
    inputs: Any
    loss: Callable[..., Any]
    targets: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def of_case(case: Case) -> Training:
    """The training of a case, its net made from the same seed every time."""
    brainstate.random.seed(0)
    x, y = data(case)
    return Training(make(case.net, case.n_in, case.n, case.n_out), case.rule, x, cross_entropy, y,
                    {'batch_size': case.batch, 'vmap': case.vmap, **case.options})


def online(train: Training, compiler: Callable[..., Any], reset: bool = False,
           **settings: Any) -> Callable[..., Any]:
    """``(inputs, targets) -> (gradients, loss)`` by the learner that ``compiler`` makes.

    With ``reset`` each call begins a new sequence: hidden states and trace are reset in it.
    """
    with traceops.configured(**settings):
        learner = compiler(train.model, train.algorithm, train.inputs[0], **train.options)
    weights = train.model.states(brainstate.ParamState)

    def call(x: Any, y: Any) -> Any:
        if reset:
            _begin(train)
            learner.reset_state(batch_size=train.options.get('batch_size'))
        return learner.etrace_grad(x, step_fn=lambda i: train.loss(learner(i), y),
                                   weights=weights, return_value=True, loss_output='scalar')
    return call


def simulation(train: Training, reset: bool = False) -> Callable[..., Any]:
    """``(inputs, targets) -> loss``, and nothing learnt."""
    _begin(train)

    def call(x: Any, y: Any) -> Any:
        if reset:
            _begin(train)
        return brainstate.transform.for_loop(lambda i: train.loss(train.model(i), y), x).mean()
    return call


def evolution(train: Training) -> Callable[..., Any]:
    """``(inputs, targets) -> loss``, and nothing learnt: as a learner simulates.

    Its trace is reset before anybody reads it, so none is formed.
    """
    learner = traceops.compile(train.model, train.algorithm, train.inputs[0], **train.options)

    def call(x: Any, y: Any) -> Any:
        out = learner.etrace_evolve(x, return_outputs=True)
        learner.reset_state(batch_size=train.options.get('batch_size'))
        return jax.vmap(lambda one: train.loss(one, y))(out).mean()
    return call


def _begin(train: Training) -> None:
    brainstate.nn.init_all_states(train.model, batch_size=train.options.get('batch_size'))


def bptt(train: Training) -> Callable[..., Any]:
    """``(inputs, targets) -> (gradients, loss)`` of the whole sequence."""
    simulate = simulation(train)
    weights = train.model.states(brainstate.ParamState)
    return lambda x, y: brainstate.transform.grad(
        lambda: simulate(x, y), weights, return_value=True)()


def contestants(case: Case, names: Collection[str] | None = None) -> dict[
        str, Callable[..., Any]]:
    """``{name: (inputs, labels) -> (gradients or None, loss)}``, those of ``names`` (default: all).

    Each has a net of its own, made from the same seed and compiled beforehand; its states
    (and its trace, where one is carried) go on from call to call, as in a training loop. Only a
    call of ``'reset'`` begins a new sequence, with a trace of zeros. On a GPU ``'xla'`` is ours
    without kernels of ours, in the form that is measured against simulation, and ``'kernel'`` is
    simulation with them.
    """
    fits, gpu = case.upstream_fits, jax.default_backend() == 'gpu'
    carried = {'carry_trace': False} if case.rule == 'D_RTRL' else {}
    makers: dict[str, tuple[bool, Callable[[Training], Callable[..., Any]]]] = {
        'upstream': (fits, lambda t: online(t, braintrace.compile)),
        'traceops': (fits, lambda t: online(t, traceops.compile)),
        'reset': (fits and case.rule == 'D_RTRL', lambda t: online(t, traceops.compile, True)),
        'free': (case.rule == 'D_RTRL',
                 lambda t: online(t, traceops.compile, carry_trace=False)),
        'xla': (gpu, lambda t: online(t, traceops.compile, backend='jax', **carried)),
        'bptt': (fits, bptt), 'forward': (True, lambda t: _without(simulation(t))),
        'kernel': (gpu, lambda t: _without(evolution(t)))}
    return {name: make(of_case(case)) for name, (runs, make) in makers.items()
            if runs and (names is None or name in names)}


def _without(simulate: Callable[..., Any]) -> Callable[..., Any]:
    """A loss, and no gradients beside it."""
    return lambda x, y: (None, simulate(x, y))


def _spikes_per_neuron(case: Case, x: Any) -> float:
    brainstate.random.seed(0)
    model = make(case.net, case.n_in, case.n, case.n_out)

    @brainstate.transform.jit
    def count() -> Any:
        brainstate.nn.init_all_states(model, batch_size=case.batch)

        def one(i: Any) -> Any:
            model(i)
            return (model.neuron.V.value / u.mV > 1.).mean()
        return brainstate.transform.for_loop(one, x).sum()
    return float(count())


def check(want: Any, got: Any) -> float:
    """Largest relative difference of a gradient leaf; raises on an all-zero gradient."""
    a, b = jax.tree.leaves(want), jax.tree.leaves(got)
    norms = [float(jnp.linalg.norm(p)) for p in a]
    if not any(norms):
        raise ValueError('every gradient is zero: the comparison proves nothing')
    apart = [float(jnp.linalg.norm(p - q)) / n if n else float(jnp.abs(q).max())
             for p, q, n in zip(a, b, norms, strict=True)]
    return float(np.max(apart))             # not max(): it would pass over NaN


def pure(fn: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of states as ``(states, *args) -> (result, states written)``, and the states."""
    stateful = brainstate.transform.StatefulFunction(fn, name='program')
    stateful.make_jaxpr(*args)
    trace = stateful.get_state_trace(*args)
    closed, tree = stateful.get_jaxpr(*args), stateful.get_out_treedef(*args)

    def function(states: Any, *args: Any) -> Any:
        flat = jax.tree.leaves((args, states))          # the order in which it was traced
        result, new = tree.unflatten(jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *flat))
        return result, [value for value, was in zip(new, trace.been_writen, strict=True) if was]
    return function, tuple(state.value for state in trace.states)


def run(case: Case, repeats: int, progress: bool = True, programs: bool = True,
        names: Collection[str] | None = None) -> Row:
    """Check the gradients, then time everybody (or those of ``names``) interleaved.

    ``programs``: compiling too.
    """
    row = Row(case)
    brainstate.environ.set(dt=1. * u.ms)
    x, y = data(case)
    row.error = _silent(case, x, row)
    if not row.error:
        fns = contestants(case, names)
        programs_of = {name: jitted(fn) for name, fn in fns.items()}
        row.error = _compared(programs_of, x, y, row)
    if not row.error:
        rounds = max(repeats, _COMPILED) if programs else 0
        for name, (seconds, program) in _compiled(fns, (x, y), rounds).items():
            row.compile_seconds[name] = float(np.median(seconds))
            used = program.memory_analysis()
            row.memory[name] = used.temp_size_in_bytes + used.argument_size_in_bytes
        row.seconds = interleaved(programs_of, (x, y), repeats, case.name if progress else None)
    row.peak_memory = _peak_memory()
    return row


def jitted(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of states as one program."""
    program: Callable[..., Any] = brainstate.transform.jit(fn)
    return program


def _peak_memory() -> int:
    """Bytes at most in use so far: of a GPU where there is one, else of this process."""
    used = jax.devices()[0].memory_stats() or {}
    return used.get('peak_bytes_in_use') or \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _silent(case: Case, x: Any, row: Row) -> str:
    if not case.spiking:
        return ''
    row.spikes = _spikes_per_neuron(case, x)
    return '' if row.spikes >= 0.05 else f'the net does not spike ({row.spikes:.3f} a neuron)'


def _compared(fns: dict[str, Any], x: Any, y: Any, row: Row) -> str:
    """Why the gradients allow no speed; with it a process has paid what it pays once."""
    results = {name: fn(x, y) for name, fn in fns.items()}
    try:
        found = [check(results['upstream'][0], results[k][0])
                 for k in ('traceops', 'reset', 'free', 'xla')
                 if k in results and 'upstream' in results]
    except ValueError as err:
        return str(err)
    row.difference = float(np.max(found)) if found else None
    if row.difference is not None and not row.difference <= TOLERANCE:
        return f'gradients differ by {row.difference:.1e} (limit {TOLERANCE:.0e})'
    return ''


def _compiled(fns: dict[str, Any], args: Any,
              rounds: int) -> dict[str, tuple[list[float], Any]]:
    """``{name: (seconds from the call to its program, the program)}``, rounds in turn."""
    found: dict[str, tuple[list[float], Any]] = {}
    for name in [*fns] * rounds:
        seconds, program = compiled(fns[name], *args)
        found[name] = [*found.get(name, ((), None))[0], seconds], program
    return found


def compiled(fn: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds from a function of states to its program, and the program."""
    gc.collect()
    gc.disable()                        # as timeit does
    start = time.perf_counter()
    function, states = pure(fn, *args)
    program = jax.jit(function).lower(states, *args).compile()
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds, program


def interleaved(fns: dict[str, Any], args: Any, repeats: int,
                 label: str | None) -> dict[str, list[float]]:
    """Rounds of one call each, in turn; short calls get more rounds.

    As in a training loop, a short call follows one of its own: giving back the memory of another's
    takes a core for some milliseconds after that has returned.
    """
    times: dict[str, list[float]] = {name: [] for name in fns}

    def once(name: str) -> float:
        start = time.perf_counter()
        jax.block_until_ready(fns[name](*args))
        return time.perf_counter() - start

    # the first call may still compile (states come back with other weak types than they began with)
    first = {name: once(name) for name in fns}
    if sum(first.values()) < _QUICK:
        first = {name: once(name) for name in fns}
    rounds = max(repeats, int(min(60, 3. / max(sum(first.values()), 1e-9))))
    for _ in tqdm(range(rounds), desc=label or '', disable=label is None, leave=False):
        for name in fns:
            if first[name] < _SHORT:
                once(name)
            times[name].append(once(name))
    return times
