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
import importlib.util
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
from traceops.errors import TraceopsError

__all__ = ['MissingCompilerError', 'Program', 'compile_stateful', 'loop_programs',
           'need_compiler', 'programs', 'read']


class MissingCompilerError(TraceopsError, RuntimeError):
    """XLA's compiler for GPUs is not installed, or not switched on."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its launches in one run, their sum, and the memory it needs besides."""

    kernels: tuple[hlo.Kernel, ...]
    total: hlo.Totals
    temporary: int


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


def programs(make: Callable[[], Training], gpu: str, free: bool = True) -> dict[str, Program]:
    """Of ``'upstream'``, ``'traceops'``, ``'reset'``, ``'free'`` and ``'forward'``.

    The first two go on from the states and the trace that the last call left; in a call of
    ``'reset'`` a new sequence begins, whose trace starts from zero; ``'free'`` carries no trace.

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
              'reset': lambda t: online(t, traceops.compile, True),
              'free': lambda t: online(t, traceops.compile, carry_trace=False),
              'forward': simulation}
    found = {}
    for name, maker in makers.items():
        if free or name not in ('reset', 'free'):
            training = make()
            compiled = compile_stateful(gpu, maker(training), training.inputs, training.targets)
            found[name] = read(compiled, gpu)
    return found


def loop_programs(case: Case, gpu: str) -> dict[str, Program]:
    """Of a training step whose loop is written by hand: ``'upstream'``, ``'traceops'``, and the
    simulation alone, ``'forward'``.

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
    found = {}
    for name, way in (('upstream', contextlib.nullcontext()),
                      ('traceops', traceops.enabled())):
        with way:
            step = loops.train_step(loops.LoopCase(case.name, case))
            found[name] = read(compile_stateful(gpu, step, *data(case)), gpu)
    training = of_case(case)
    found['forward'] = read(compile_stateful(
        gpu, simulation(training), training.inputs, training.targets), gpu)
    return found
