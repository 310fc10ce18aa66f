# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A loop whose gradients wait: a window of steps without traces, then the gradients of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from traceops.compiler.products import Products, prepared
from traceops.compiler.simulation import Simulate
from traceops.compiler.types import typed
from traceops.loops.analysis import Analysis, Learner, Product
from traceops.loops.at_once import Body, StepsAtOnce
from traceops.loops.flat import Value, apply, read
from traceops.loops.rewrite import Kept
from traceops.loops.trace import TracedLoop

__all__ = ['DeferredLoop', 'WindowRule']


class WindowRule(Protocol):
    """How the gradients of a learner are formed from the record of a window."""

    found: Learner

    @property
    def reads(self) -> Iterable[Value]:
        """What of the body the record of a step is made of."""

    def window(self, steps: int, step_bytes: int) -> int:
        """Steps in a window, of a loop of ``steps`` with so many bytes of record each."""

    def entering(self, init: Sequence[Any], once: bool) -> Any:
        """What passes from window to window, from the carries of the loop.

        ``once``: there is one window, and what enters it need not be what leaves it.
        """

    def leaving(self, carry: Any) -> dict[int, Any]:
        """The carries of the loop from that."""

    def inner(self, carry: Any) -> Any:
        """What is folded step by step, from what enters the window."""

    def fold_step(self, inner: Any, env: dict[Value, Any]) -> tuple[Any, Any]:
        """Fold one step, of which ``env`` has the values; the record of it.

        Where the steps of a window are taken at once, nothing is folded.
        """

    def close(self, carry: Any, inner: Any, record: Any, constant: Callable[[Value], Any],
              steps: int) -> tuple[dict[Product, dict[Value, Any]], Any]:
        """Sums over the window of the results of gradient nodes; what enters the next one.

        Of the record of so many ``steps``, what is the same at all may have come once.
        """


class DeferredLoop:
    """A loop without the traces of learners whose gradients wait; call it to run it.

    Parameters
    ----------
    original : callable
        ``jax.lax.scan``.
    loop : TracedLoop
    analysis : Analysis
        Of its body.
    learners : sequence of WindowRule
        Those of :attr:`Analysis.deferred`.
    cpu : bool
        Whether products are taken in the form that a CPU is quickest with.
    unroll : int
        Steps in an iteration, where the loop does not set more than one.
    simulate : callable, optional
        The steps of a window are taken in two phases, and this runs the loop that only simulates
        (see :class:`traceops.compiler.program.StepProgram`). Without it, one loop does all.
    """

    def __init__(self, original: Callable[..., Any], loop: TracedLoop, analysis: Analysis,
                 learners: Sequence[WindowRule], cpu: bool, unroll: int,
                 simulate: Simulate | None = None) -> None:
        self.original, self.loop, self.analysis = original, loop, analysis
        self.learners = learners
        self.unroll = unroll if loop.unroll == 1 else loop.unroll
        found = [one.found for one in learners]
        self.kept = Kept(analysis, found)
        gone = {i for one in found for i in (*one.trace, *one.filters)}
        fixed = {i for i, v in enumerate(analysis.entering) if v is analysis.leaving[i]}
        self.sums = [i for i in range(loop.carries) if self.kept.untouched(i)]
        self.fixed = sorted(fixed)
        self.live = [i for i in range(loop.carries)
                     if i not in gone and i not in fixed and i not in self.sums]
        body = Body(analysis, self.kept, self.live, list(analysis.flat.outputs[loop.carries:]),
                    [v for one in learners for v in one.reads], self._records)
        self.wanted = [*(analysis.leaving[i] for i in self.live), *body.outputs, *body.reads]
        self.at_once = None if simulate is None else StepsAtOnce(body, simulate, self.unroll)
        self.window = self._choose_window()
        self.products = self.kept.products(loop.known) if cpu else []

    def __call__(self, *operands: Any) -> list[Any]:
        """The results of the loop's equation."""
        run, loop = jax.custom_jvp(self._run), self.loop
        # differentiated from outside, the loop is the one that was written
        run.defjvp(lambda primals, tangents: jax.jvp(
            lambda *given: apply(loop, given), primals, tangents))
        types = [v.aval for v in loop.closed.jaxpr.outvars]     # weak where the loop's are
        return [typed(a, like) for a, like in zip(run(*operands), types, strict=True)]

    # -- a step --------------------------------------------------------------------------------

    def _step(self, constants: dict[Value, Any], carry: Any, x: Any,
              products: Products) -> Any:
        live, inners = carry
        analysis, carries = self.analysis, self.loop.carries
        env = dict(constants)
        env.update(zip((analysis.entering[i] for i in self.live), live, strict=True))
        env.update(zip(analysis.flat.inputs[carries:], x, strict=True))
        self.kept.run(env, self.wanted, products)
        new = [read(env, analysis.leaving[i]) for i in self.live]
        ys = [read(env, v) for v in analysis.flat.outputs[carries:]]
        both = [one.fold_step(inner, env) for one, inner in zip(self.learners, inners, strict=True)]
        return (new, [inner for inner, _ in both]), (ys, [record for _, record in both])

    def _records(self, env: dict[Value, Any]) -> list[Any]:
        """Of one step, where nothing is folded."""
        return [one.fold_step(one.inner(None), env)[1] for one in self.learners]

    def _constants(self, consts: Any, init: Any) -> dict[Value, Any]:
        return {**dict(zip(self.analysis.flat.constants, consts, strict=True)),
                **{self.analysis.entering[i]: init[i] for i in self.fixed}}

    def _choose_window(self) -> int:
        def step(*inputs: Any) -> Any:
            consts, init, x = self.loop.split(inputs)
            inners = [one.inner(one.entering(init, False)) for one in self.learners]
            return self._step(self._constants(consts, init),
                              ([init[i] for i in self.live], inners), x, {})[1][1]

        records = jax.eval_shape(step, *(jax.ShapeDtypeStruct(a.shape, a.dtype)
                                         for a in self.loop.closed.in_avals))
        size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(records))
        return min(one.window(self.loop.steps, size) for one in self.learners)

    # -- all of them -----------------------------------------------------------------------------

    def _run(self, *operands: Any) -> list[Any]:
        consts, init, xs = self.loop.split(operands)
        constants = self._constants(consts, init)
        known = self.loop.known         # of patterns, which are tracers among the operands
        products = prepared(
            ((n.outputs[0], n, n.inputs) for n in self.products),
            lambda v: known[v] if v in known else self.kept.constant(v, dict(constants)))
        if self.loop.reverse:
            xs = [jnp.flip(a, 0) for a in xs]
        full = ([init[i] for i in self.live], [init[i] for i in self.sums],
                [one.entering(init, self.window == self.loop.steps) for one in self.learners])
        full, ys = self._windows(
            lambda full, xs_w, count: self._window(constants, products, full, xs_w, count),
            full, xs)
        if self.loop.reverse:
            ys = [jnp.flip(a, 0) for a in ys]
        return [*self._carry(full, init), *ys]

    def _window(self, constants: dict[Value, Any], products: Products, full: Any,
                xs: Any, count: int) -> Any:
        live, sums, carries = full
        inners = [one.inner(c) for one, c in zip(self.learners, carries, strict=True)]
        known = dict(constants)

        def constant(v: Value) -> Any:
            return self.kept.constant(v, known)

        if self.at_once is not None:
            live, ys, records = self.at_once(constants, live, xs, count, constant)
        else:
            (live, inners), (ys, records) = self.original(
                lambda c, x: self._step(constants, c, x, products), (live, inners), xs,
                length=count, unroll=self.unroll)
        solved, after = {}, []
        for one, carry, inner, record in zip(self.learners, carries, inners, records, strict=True):
            grads, carry = one.close(carry, inner, record, constant, count)
            solved.update(grads)
            after.append(carry)
        total = self.kept.after(constant, solved)
        live = [a + total[i].astype(a.dtype) if i in total else a
                for i, a in zip(self.live, live, strict=True)]
        sums = [a + total[i].astype(a.dtype) for i, a in zip(self.sums, sums, strict=True)]
        return (live, sums, after), ys

    def _windows(self, window: Callable[..., Any], full: Any, xs: Any) -> Any:
        whole, rest = divmod(self.loop.steps, self.window)
        K, parts = self.window, []
        if whole == 1:
            full, ys = window(full, [a[:K] for a in xs], K)
            parts.append(ys)
        else:
            head = [a[:whole * K].reshape(whole, K, *a.shape[1:]) for a in xs]
            full, ys = self.original(lambda c, x: window(c, x, K), full, head, length=whole)
            parts.append([a.reshape(whole * K, *a.shape[2:]) for a in ys])
        if rest:
            full, ys = window(full, [a[whole * K:] for a in xs], rest)
            parts.append(ys)
        return full, parts[0] if len(parts) == 1 else [
            jnp.concatenate(both) for both in zip(*parts, strict=True)]

    def _carry(self, full: Any, init: Any) -> list[Any]:
        live, sums, carries = full
        out = {i: init[i] for i in self.fixed}
        out.update(zip(self.live, live, strict=True))
        out.update(zip(self.sums, sums, strict=True))
        for one, carry in zip(self.learners, carries, strict=True):
            out.update(one.leaving(carry))
        return [out[i] for i in range(self.loop.carries)]
