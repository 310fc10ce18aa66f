# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops programs``: what training costs as a GPU program, found without a GPU.

The training call ``etrace_grad`` of upstream and of traceops, and the simulation of the same net,
compiled for an NVIDIA GPU that need not be there: kernels launched, bytes moved, and XLA's model
of the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import brainstate
import braintrace
import jax
import saiunit as u

import traceops
from traceops.benchmarks import hlo, loops
from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import Training, data, of_case, online, pure, simulation
from traceops.benchmarks.simulations import alone, largest, simulations_of
from traceops.errors import TraceopsError

__all__ = ['MissingCompilerError', 'Program', 'compile_stateful', 'loop_programs',
           'need_compiler', 'programs', 'read']


class MissingCompilerError(TraceopsError, RuntimeError):
    """XLA's compiler for GPUs is not installed, or not switched on."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its launches in one run, their sum, and the memory it needs besides.

    ``seconds``: CPU time of compiling it, if it was taken.
    """

    kernels: tuple[hlo.Kernel, ...]
    total: hlo.Totals
    temporary: int
    seconds: float | None = None


def need_compiler() -> None:
    """Raise where programs for GPUs cannot be compiled, saying where they can."""
    why = None
    if not any(importlib.util.find_spec(f'jax_cuda{v}_plugin') for v in (12, 13)):
        why = 'is not installed (it is in the jax-cuda13-plugin)'
    elif 'cuda' not in (jax.config.jax_platforms or 'cuda'):
        why = f'is switched off by JAX_PLATFORMS={jax.config.jax_platforms}'
    if why:
        raise MissingCompilerError(
            f"XLA's compiler for NVIDIA GPUs {why}. In a checkout, `make gpu-programs` sets up "
            'an environment that has it, without a GPU, and runs this there.')


def compile_stateful(gpu: str, fn: Callable[..., Any], *args: Any) -> Any:
    """The program of a function of states, for a GPU in ``targets.GPUS``."""
    from traceops.benchmarks.targets import compile_for
    function, states = pure(fn, *args)
    return compile_for(gpu, function, *jax.eval_shape(lambda *a: a, states, *args))


def read(compiled: Any, gpu: str) -> Program:
    """What a compiled program launches."""
    from traceops.benchmarks.targets import GPUS
    text = compiled.as_text()
    kernels = hlo.kernels(text, GPUS[gpu].bandwidth, GPUS[gpu].peaks)
    return Program(tuple(kernels), hlo.total(kernels, text),
                   compiled.memory_analysis().temp_size_in_bytes)


def _timed(gpu: str, fn: Callable[..., Any], *args: Any) -> Program:
    """The program of a function of states, and how long it took to compile."""
    from traceops.benchmarks.targets import compile_for
    importlib.import_module('jax_triton')       # what the first kernel of a process imports
    function, states = pure(fn, *args)
    given = jax.eval_shape(lambda *a: a, states, *args)
    jax.clear_caches()
    before = _cpu_seconds()
    compiled = compile_for(gpu, function, *given)
    return dataclasses.replace(read(compiled, gpu), seconds=_cpu_seconds() - before)


def _cpu_seconds() -> float:
    """Of this process, and of those that it waited for: assemblers."""
    return sum(os.times()[:4])


def _alone(gpu: str, fn: Callable[..., Any], *args: Any) -> dict[str, Program]:
    """The simulation of a training call by itself, as the call runs it."""
    from traceops.benchmarks.targets import compile_for
    found = largest(simulations_of(fn, *args))
    return {} if found is None else {'alone': read(compile_for(
        gpu, alone(found), *found.operands), gpu)}


def programs(make: Callable[[], Training], gpu: str, free: bool = True) -> dict[str, Program]:
    """Of ``'upstream'``, ``'traceops'``, ``'loop'``, ``'reset'``, ``'free'``, ``'alone'`` and
    ``'forward'``.

    The first three go on from the states and the trace that the last call left, ``'loop'`` without
    a kernel of ours; in a call of ``'reset'`` a new sequence begins, whose trace starts from zero;
    ``'free'`` carries no trace. ``'alone'`` is what simulates in ``'traceops'``, if a kernel can,
    and ``'forward'`` the simulation as XLA compiles it.

    Parameters
    ----------
    make : callable
        Makes the training, net included: once for each program.
    gpu : str
        A key of ``targets.GPUS``.
    free : bool
        Whether there is a trace of the size of the weights, which a call may do without.

    Raises
    ------
    MissingCompilerError
        XLA's compiler for GPUs is not there.
    """
    need_compiler()
    brainstate.environ.set(dt=1. * u.ms)
    makers = {'upstream': lambda t: online(t, braintrace.compile),
              'traceops': lambda t: online(t, traceops.compile),
              'loop': lambda t: online(t, traceops.compile, backend='jax'),
              'reset': lambda t: online(t, traceops.compile, True),
              'free': lambda t: online(t, traceops.compile, carry_trace=False),
              'alone': lambda t: online(t, traceops.compile), 'forward': simulation}
    found: dict[str, Program] = {}
    for name, maker in makers.items():
        if free or name not in ('reset', 'free'):
            training = make()
            given = maker(training), training.inputs, training.targets
            found |= _alone(gpu, *given) if name == 'alone' else {name: _timed(gpu, *given)}
    return found


def loop_programs(case: Case, gpu: str) -> dict[str, Program]:
    """Of a training step whose loop is written by hand: ``'upstream'``, ``'traceops'``,
    ``'loop'``, ``'alone'`` and ``'forward'``, as of :func:`programs`.

    Parameters
    ----------
    case : Case
    gpu : str
        A key of ``targets.GPUS``.

    Raises
    ------
    MissingCompilerError
        XLA's compiler for GPUs is not there.
    """
    need_compiler()
    brainstate.environ.set(dt=1. * u.ms)
    found: dict[str, Program] = {}
    for name, way in (('upstream', contextlib.nullcontext()), ('traceops', traceops.enabled()),
                      ('loop', traceops.enabled(backend='jax'))):
        with way:
            step = loops.train_step(loops.LoopCase(case.name, case))
            found[name] = _timed(gpu, step, *data(case))
    with traceops.enabled():
        found |= _alone(gpu, loops.train_step(loops.LoopCase(case.name, case)), *data(case))
    training = of_case(case)
    found['forward'] = read(compile_stateful(
        gpu, simulation(training), training.inputs, training.targets), gpu)
    return found
