# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Steps without a loss whose trace a gradient of the same program can do without.

``etrace_evolve``, then ``etrace_grad``: what the trace between them owes to the signals of the
gradient can also be had from the record of the steps, by the adjoint, as where no trace is
carried. So the trace is formed as ever, but where the gradient is all that follows nobody reads
it, and XLA takes out what forms it. Where something does (a state that the program returns,
``get_etrace_of``), it is there.
"""

from __future__ import annotations

import weakref
from typing import Any

import jax

__all__ = ['WarmUp']


class WarmUp:
    """The record of the steps that a learner's trace came from, if they are known.

    Of one program, while it is traced: it is dropped together with the trace.
    """

    def __init__(self) -> None:
        self._trace: list[Any] = []         # weak references to its leaves
        self._weights: list[Any] = []
        self._steps: Any = None

    def keep(self, trace: Any, weights: Any, record: Any, before: Any) -> None:
        """The steps that a trace came from, and the weights that it was formed with.

        ``before``: the trace at their start, empty where it is known to be zero.
        """
        self._steps, self._weights = (record, before), jax.tree.leaves(weights)
        self._trace = [weakref.ref(leaf, lambda _: self.forget()) for leaf in
                       jax.tree.leaves(trace)]

    def forget(self) -> None:
        """The trace is another one from now on."""
        self._trace, self._weights, self._steps = [], [], None

    def steps_of(self, trace: Any, weights: Any) -> Any:
        """The record ``[T, ...]`` of the steps that made just this trace, and the one at their
        start; ``None``: unknown.
        """
        leaves, values = jax.tree.leaves(trace), jax.tree.leaves(weights)
        same = (len(leaves) == len(self._trace) > 0 and len(values) == len(self._weights)
                and all(one() is leaf for one, leaf in zip(self._trace, leaves, strict=True))
                and all(a is b for a, b in zip(self._weights, values, strict=True)))
        return self._steps if same else None
