# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a learner writes down in a step instead of updating a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from traceops.host import upstream
from traceops.host.relations import Keys, relation_views, split_states

__all__ = ['Recorder']


class Recorder:
    """The states through which the factors of a step leave the model.

    *Ports* are zeros in the place of the trace; their cotangent is the learning signal. The
    *tape* takes the inputs ``x_t``, factors ``f_t`` and Jacobians ``D_t``. Both are brainstate
    states, so they pass through whatever transformation the step function applies.

    Parameters
    ----------
    learner : braintrace learner
        Compiled graph, states not yet initialised.
    """

    def __init__(self, learner: Any) -> None:
        self.groups = tuple(learner.graph.hidden_groups)
        self.views = relation_views(learner)
        self.keys = Keys(learner)
        self.bypass = upstream.has_bypass(learner)
        self.active = False
        self._signals: dict[str, list[Any]] = {}
        #: A call was given several steps at once, which have no record.
        self.several_steps = False
        self.ports = {
            name: brainstate.ShortTermState([self._zeros(g) for g in self.groups])
            for name in ('signal', *(('bypass',) if self.bypass else ()))}
        leaves, self._tree = jax.tree.flatten(self._blank())
        # a state for each array: under vmap one that is the same in every lane stays unmapped,
        # and the leaves of one state have to agree on that
        self.tape = tuple(brainstate.ShortTermState(leaf) for leaf in leaves)

    @property
    def states(self) -> dict[str, Any]:
        """Every state of the recorder, by name."""
        return {**self.ports, **{f'tape{i}': state for i, state in enumerate(self.tape)}}

    @property
    def invariant(self) -> tuple[Any, ...]:
        """Of the tape: factors and Jacobians, which may be the same at every step."""
        places = self._tree.unflatten(range(len(self.tape)))
        return tuple(self.tape[i] for i in jax.tree.leaves((places['f'], places['D'])))

    @staticmethod
    def _zeros(group: Any) -> Any:
        dtype = jnp.result_type(*(v.aval.dtype for v in group.hidden_outvars))
        return jnp.zeros((*group.varshape, group.num_state), dtype)

    def _blank(self) -> dict[str, Any]:
        xs = {v.x_key: jnp.zeros(v.relation.x_var.aval.shape, v.relation.x_var.aval.dtype)
              for v in self.views if v.has_input}
        zeros = {g.index: self._zeros(g)[..., 0] for g in self.groups}
        fs = {v.factor_key(g.index): (zeros[g.index],) * g.num_state
              for v in self.views for g in v.relation.hidden_groups}
        Ds = [((zeros[g.index],) * g.num_state,) * g.num_state for g in self.groups]
        return {'x': xs, 'f': fs, 'D': Ds}

    def resize(self, batch_size: int | None) -> None:
        """Follow ``reset_state(batch_size)``: the leading axis of every array.

        Not arrays of a device: they would be carried by the program that resets.
        """
        def resized(a: Any) -> Any:
            shape = a.shape if batch_size is None else (batch_size, *a.shape[1:])
            return np.zeros(shape, a.dtype)
        with self.detached():
            for state in self.states.values():
                state.value = jax.tree.map(resized, state.value)

    @contextlib.contextmanager
    def detached(self) -> Iterator[None]:
        """The states belong to the call: no transformation around it sees them come or go."""
        around = brainstate.State(None).stack_level     # what is made here is not seen there
        before = [(state, state.stack_level) for state in self.states.values()]
        for state, _ in before:
            state.stack_level = around
        try:
            yield
        finally:
            for state, level in before:
                state.stack_level = level

    def take_signal(self, signal: Any, before: bool) -> None:
        """A step's learning signal, on its new hidden values or on those ``before``."""
        self._signals['signal'] = list(map(jnp.zeros_like, signal) if before else signal)
        if before:
            self.take_bypass(signal)

    def take_bypass(self, signal: Any) -> None:
        """A signal on the previous hidden values."""
        self._signals['bypass'] = list(signal)

    def given_signals(self) -> dict[str, Any]:
        """The cotangents of the ports, once."""
        given, self._signals = self._signals, {}
        return given

    def write(self, factors: dict[str, Any]) -> None:
        """Put one step's factors on the tape."""
        leaves, tree = jax.tree.flatten(factors)
        if tree != self._tree:
            raise TypeError(f'the step recorded {tree}, the tape holds {self._tree}')
        for state, leaf in zip(self.tape, leaves, strict=True):
            state.value = leaf

    def read(self, leaves: Any) -> dict[str, Any]:
        """The factors in the values of the tape."""
        return jax.tree.unflatten(self._tree, leaves)

    def record(self, h2w: Any, h2h: Any, several_steps: bool) -> dict[str, Any]:
        """One step's factors and Jacobians, as upstream has them."""
        if several_steps:
            self.several_steps = True
            return self._blank()
        xs, fs = self.keys.ours(h2w)
        return self.of_step(xs, fs, h2h)

    def of_step(self, xs: Any, fs: Any, Ds: Any) -> dict[str, Any]:
        """The same by our keys; each state becomes an array of its own."""
        return {
            'x': {v.x_key: xs[v.x_key] for v in self.views if v.has_input},
            'f': {k: split_states(f) for k, f in fs.items()},
            'D': [tuple(split_states(D[..., i, :]) for i in range(D.shape[-1])) for D in Ds],
        }

