# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``sparse_trace_gradient``: the gradient of a window for the synapses of a sparse weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.kernels.sparse_trace_gradient import launch
from traceops.kernels.sparse_trace_gradient.cpu import sparse_trace_gradient as _on_cpu
from traceops.kernels.sparse_trace_gradient.reference import sparse_trace_gradient as _definition
from traceops.ops.checks import positions, ranked, same_dtype
from traceops.ops.primitive import Axes, Operation, at_axis, bind, define

__all__ = ['SPARSE_TRACE_GRADIENT', 'sparse_trace_gradient']

_NAME = 'sparse_trace_gradient'
_NAMES = ('inputs', 'delta', 'sources', 'targets')


def _axes(inputs: Any, delta: Any, sources: Any, targets: Any, *, by_sample: bool,
          **_: Any) -> Axes:
    lanes = positions(_NAME, 'inputs', inputs, '[T, B, I]', 3)
    ranked(_NAME, 'delta', delta, '[T, B, O]', len(lanes) + 3)
    ranked(_NAME, 'sources', sources, '[K]', 1)
    ranked(_NAME, 'targets', targets, '[K]', 1)
    return Axes(operands=((*lanes, 't', 'b', 'i'), (*lanes, 't', 'b', 'o'), ('k',), ('k',)),
                results=((*lanes, *('b',) * by_sample, 'k'),),
                replicated=frozenset({'i', 'o'}), summed=('t', 'b'))


def _dtypes(*operands: Any, **_: Any) -> list[Any]:
    for name, a in zip(_NAMES[2:], operands[2:], strict=True):
        if a.dtype != jnp.int32:
            raise TypeError(f'{_NAME}: `{name}` is {a.dtype}; it takes int32, '
                            f'e.g. {name}.astype(jnp.int32).')
    return [same_dtype(_NAME, _NAMES[:2], operands[:2])]


def _batch(operation: Operation, size: int, operands: Sequence[Any], dims: Sequence[Any],
           request: str, params: dict[str, Any]) -> Any:
    """Lanes of inputs and deltas are lanes of the call; of patterns, calls one after the other."""
    if dims[2] is None and dims[3] is None:
        moved = [at_axis(a, d, 0, size) for a, d in zip(operands[:2], dims[:2], strict=True)]
        return bind(operation, *moved, *operands[2:], backend=request, **params), [0]
    moved = [at_axis(a, d, 0, size) for a, d in zip(operands, dims, strict=True)]
    return jax.lax.map(lambda one: bind(operation, *one, backend=request, **params), moved), [0]


def _cases() -> list[Any]:
    rng = np.random.default_rng(3)
    draw = lambda *shape: np.float32(rng.standard_normal(shape))  # noqa: E731
    sources = np.sort(rng.integers(0, 33, 200)).astype(np.int32)
    targets = rng.integers(0, 36, 200).astype(np.int32)
    return [((draw(7, 3, 33), draw(7, 3, 36), sources, targets), {'by_sample': by_sample})
            for by_sample in (False, True)]


def _reference(*operands: Any, by_sample: bool, **_: Any) -> Any:
    return (_definition(*operands, by_sample=by_sample),)


def _cpu(*operands: Any, events: bool = False, **params: Any) -> Any:
    return (_on_cpu(*operands, events=events, **params),)


SPARSE_TRACE_GRADIENT = define(Operation(
    name=_NAME, arguments=lambda count, **_: _NAMES,
    reference=_reference, cpu=_cpu, axes=_axes, dtypes=_dtypes, kernel=launch.plan, batch=_batch,
    cases=_cases))


def sparse_trace_gradient(inputs: Any, delta: Any, sources: Any, targets: Any, *,
                          by_sample: bool = False, events: bool = False,
                          backend: str | None = None) -> Any:
    r"""Gradient of a window for synapses: :math:`g_k = \sum_t \sum_b x[i_k]\,\delta[o_k]`.

    What the gradient of a dense weight has at the places of a sparse one, without the rest.

    Parameters
    ----------
    inputs : array, ``[T, B, I]``
        :math:`x`.
    delta : array, ``[T, B, O]``
        :math:`\delta`.
    sources, targets : int32 arrays, ``[K]``
        Input :math:`i_k` and output :math:`o_k` of every synapse, ordered by the input. Two may
        connect the same.
    by_sample : bool
        Sum over steps alone. The result is ``[B, K]``.
    events : bool
        The inputs may be spikes. On a CPU a large call is then a program that counts those that
        are not zero, and of few adds only what they contribute: the same sum to rounding. It takes
        longer to compile.
    backend : {'auto', 'jax', 'triton'}, optional
        Default: ``traceops.settings().backend``.

    Returns
    -------
    array, ``[K]``

    Raises
    ------
    ValueError, TypeError
        A shape or dtype that does not fit; the message names the argument.
    BackendError
        ``backend`` is named and cannot run here.
    """
    return bind(SPARSE_TRACE_GRADIENT, inputs, delta, sources, targets, backend=backend,
                by_sample=bool(by_sample), events=bool(events))[0]
