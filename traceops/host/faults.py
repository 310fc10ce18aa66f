# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Faults of other packages that a learner may meet and its gradients do not show."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.host import upstream

__all__ = ['FUSION', 'meets_fusion_fault', 'miscompiles', 'notes', 'untrained']

#: States a neuron from which the fault shows.
_STATES = 6

FUSION = ('this jaxlib (0.10.2 does; 0.11.2 and 0.12.0.1 do not) compiles upstream\'s step of a '
          'trace of six states a neuron or more wrongly for a CPU in float32, where the op has no '
          'closed form: without traceops, which writes the step another way, gradients may be off '
          'by tens of per cent. Set XLA_FLAGS=--xla_cpu_use_fusion_emitters=false to have upstream '
          'right as well, or install another jaxlib')


def _product(jacobian: Any, trace: Any) -> Any:
    """``[O, S, S]`` by ``[I, O, S]``, as upstream maps it."""
    def row(d: Any) -> Any:
        return jnp.sum(jax.vmap(lambda d, e: e * d[None, :], in_axes=-1, out_axes=-1)(
            d, trace), -1)
    return jax.vmap(row, in_axes=-2, out_axes=-1)(jacobian)


@functools.cache
def miscompiles() -> bool:
    """Whether a CPU program of jaxlib is wrong: the fault's few lines are run once a process."""
    rng = np.random.RandomState(0)
    jacobian = rng.randn(4, 60, _STATES, _STATES).astype(np.float32)
    trace = rng.randn(4, 100, 60, _STATES).astype(np.float32)
    want = np.einsum('bosr,bior->bios', jacobian.astype(float), trace.astype(float))
    cpu = jax.devices('cpu')[0]
    # asked while a step is traced, too, and whatever is forbidden to the program that it is part of
    with jax.ensure_compile_time_eval(), jax.transfer_guard('allow'), jax.disable_jit(False):
        got = np.asarray(jax.jit(jax.vmap(_product))(*jax.device_put((jacobian, trace), cpu)))
    return bool(np.abs(got - want).max() > 1e-2)


def meets_fusion_fault(learner: Any) -> bool:
    """Whether upstream's steps of this learner are of the kind that :func:`miscompiles` finds."""
    return (jax.default_backend() == 'cpu'
            and isinstance(learner, upstream.ParamDimVjpAlgorithm)
            and any(g.num_state >= _STATES and r.y_var.aval.dtype == jnp.float32
                    for r in learner.graph.hidden_param_op_relations
                    if upstream.is_stepped(learner, r) for g in r.hidden_groups)
            and miscompiles())


def untrained(learner: Any) -> list[str]:
    """Parameters whose gradient this braintrace returns as exactly zero.

    With ``vjp_method='single-step'`` it has none for a parameter that no hidden state follows
    (a readout that is no state of its own); from 0.2.8 on it has, where an output follows it.
    """
    if learner.vjp_method != 'single-step':
        return []
    known = {path for r in learner.graph.hidden_param_op_relations
             for path in r.trainable_paths.values()}
    known |= set(getattr(learner.graph.hidden_perturb, 'bypass_param_paths', ()))
    return ['.'.join(map(str, path)) for path in learner.param_states if path not in known]


def notes(learner: Any) -> list[str]:
    """What ``explain`` says of a learner."""
    found = [FUSION] if meets_fusion_fault(learner) else []
    missed = untrained(learner)
    if missed:
        found.append(f'not trained by this version of braintrace, as upstream (their gradient is '
                     f'exactly zero with vjp_method=\'single-step\'): {", ".join(missed)}')
    return found
