# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Each kernel of ``simulate_window`` is a text of its own, so each is tried before it is used.

On drawn values: eight steps, each from the reference's states before it, then four steps in one
walk. A neuron that is so close to a jump (a threshold) that rounding decides is not compared: one
whose value jumps where states and inputs are a little larger or smaller. The reference multiplies
in full float32 here, whatever jax does by default.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from traceops.kernels.simulate_window.anatomy import anatomy

__all__ = ['drawn', 'trial']

#: How much states and inputs are moved to find what is close to a jump; by how much that changes
#: a value that is not; by norm, how far a kernel may be from the reference.
_MOVED, _SMOOTH, _TOLERANCE = 1e-5, 1e-3, 1e-5
_STEPS, _WALK = 8, 4


def trial(operation: Any, operands: Sequence[Any], params: dict[str, Any],
          device: Any) -> tuple[bool, str]:
    """Whether the kernel of a step does what the reference does, and what was found.

    Parameters
    ----------
    operation : Operation
    operands : sequence
        Anything with the shapes and dtypes of a call.
    params : dict
        The primitive's.
    device : jax.Device
    """
    step, rng = _precise(params['step']), np.random.default_rng(0)
    constants, slices, states = step.split(operands)
    fixed = [drawn(rng, a.shape, a.dtype) for a in constants]
    call = functools.partial(operation.primitive.bind, devices=None, step=step)
    both = [jax.jit(functools.partial(call, request=request)) for request in ('jax', 'triton')]

    def run(which: int, xs: Any, before: Any, sign: float = 0.) -> list[np.ndarray]:
        moved = [[_moved(a, sign) for a in part] for part in (xs, before)]
        given = jax.device_put([*fixed, *moved[0], *moved[1]], device)
        return [np.asarray(a) for a in both[which](*given)]

    worst, now = 0., [drawn(rng, a.shape, a.dtype) for a in states]
    first = now
    for T in (*(1,) * _STEPS, _WALK):
        xs = [drawn(rng, (T, *a.shape[1:]), a.dtype) for a in slices]
        before = first if T > 1 else now
        want, got = run(0, xs, before), run(1, xs, before)
        jumps = [_jumps(a, *pair) for a, *pair in zip(
            want, run(0, xs, before, 1.), run(0, xs, before, -1.), strict=True)]
        if T > 1:           # a spike more or less is passed on: to the sample, not to others
            jumps = _of_samples(jumps, step, len(states))
        for a, b, jump in zip(got, want, jumps, strict=True):
            worst = float(np.max([worst, _difference(a, b, jump)]))
        now = [np.nan_to_num(a) for a in want[:len(states)]]
    if not worst <= _TOLERANCE:
        return False, (f'it differs from the reference by {worst:.1e} on drawn states '
                       f'(at most {_TOLERANCE:.0e} is rounding)')
    return True, f'checked on this device, difference {worst:.0e}'


def _precise(step: Any) -> Any:
    """The same step with products in full float32, as the kernel adds.

    What jax takes by default is coarser on a GPU (tf32): no reference for a kernel.
    """
    step = anatomy(step).step
    full = (jax.lax.Precision.HIGHEST,) * 2
    eqns = [eqn.replace(params={**eqn.params, 'precision': full})
            if eqn.primitive.name == 'dot_general' else eqn for eqn in step.closed.jaxpr.eqns]
    return dataclasses.replace(step, closed=step.closed.replace(
        jaxpr=step.closed.jaxpr.replace(eqns=eqns)))


def drawn(rng: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Weights as they are before training; numbers around one; states and inputs."""
    if not np.issubdtype(dtype, np.inexact) and dtype.name != 'bfloat16':
        return rng.integers(0, 2, shape).astype(dtype)
    if len(shape) < 2:
        return rng.uniform(.5, 1.5, shape).astype(dtype)
    return (rng.standard_normal(shape) * min(1., 3. / shape[-2] ** .5)).astype(dtype)


def _moved(a: np.ndarray, sign: float) -> np.ndarray:
    if not sign or a.dtype != np.float32:
        return a
    return (a * (1. + sign * _MOVED) + sign * _MOVED).astype(np.float32)


def _jumps(want: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Where a value is close to a jump."""
    with np.errstate(invalid='ignore'):
        far = [np.abs(a - want) > _SMOOTH * (1. + np.abs(want)) for a in (up, down)]
    return far[0] | far[1] | ~np.isfinite(want + up + down)


def _of_samples(jumps: list[np.ndarray], step: Any, states: int) -> list[np.ndarray]:
    """The same of whole samples, over all steps and results."""
    count = step.states[0].aval.ndim - 1
    samples = step.states[0].aval.shape[:count]
    any_of = np.zeros(samples, bool)
    for i, jump in enumerate(jumps):
        jump = jump if i < states else np.moveaxis(jump, 0, -1)
        if jump.shape[:count] == samples:
            any_of |= jump.reshape(*samples, -1).any(-1)
    out = []
    for i, jump in enumerate(jumps):
        lead = any_of if i < states else any_of[None]
        fits = jump.shape[(i >= states):][:count] == samples
        out.append(np.broadcast_to(
            lead.reshape(lead.shape + (1,) * (jump.ndim - lead.ndim)), jump.shape)
            if fits else jump)
    return out


def _difference(got: np.ndarray, want: np.ndarray, jump: np.ndarray) -> float:
    """By norm, of what is not close to a jump."""
    a, b = (np.where(jump, 0., v).astype(np.float64) for v in (got, want))
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30))
