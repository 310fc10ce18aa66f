# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Loops that people write around a learner: gradients that are only added up wait until after.

``jax.lax.scan`` is underneath ``brainstate.transform.scan``, ``for_loop`` and every loop written
by hand. :func:`scan` stands in its place: it traces the body once, looks for a learner's steps
(:mod:`traceops.engine.step`), asks :mod:`traceops.loops.analysis` whether their gradients can
wait, and runs the loop without traces, a window at a time. Every other loop is the original's.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from traceops.engine.windows import choose_window
from traceops.host.deferred import Deferred
from traceops.host.plan import form_of_loops, why_short
from traceops.host.relations import event_weights
from traceops.host.steps import loops_are_watched, unwatched
from traceops.loops.analysis import Analysis, Learner, owners_in
from traceops.loops.flat import Value, flatten, read
from traceops.loops.rewrite import Kept

__all__ = ['Loop', 'known', 'scan', 'watching']


@dataclasses.dataclass(frozen=True)
class Loop:
    """What became of one loop around fast learners.

    Attributes
    ----------
    where : str
        File, line and function that wrote the loop.
    steps : int
    window : int or None
        Steps whose factors are kept before their gradients are formed; ``None``: no gradient
        waits.
    deferred : tuple of str
        Learners whose gradients wait.
    kept : tuple of (str, str)
        Learners that run as they are written, and why.
    block_products : int
        Products with large weights that are taken some columns at a time.
    events : tuple of str
        Parameters whose gradient is summed over spikes, where few are not zero.
    """

    where: str
    steps: int
    window: int | None
    deferred: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]
    block_products: int = 0
    events: tuple[str, ...] = ()


watching: ContextVar[list[Loop] | None] = ContextVar('traceops_watching', default=None)
_known: dict[Loop, None] = {}
_MOST = 256                     # loops that are remembered


def known() -> tuple[Loop, ...]:
    """The loops around fast learners that this process has traced, the oldest first."""
    return tuple(_known)


def scan(original: Callable[..., Any], f: Callable[..., Any], init: Any, xs: Any = None,
         length: int | None = None, reverse: bool = False, unroll: Any = 1,
         **options: Any) -> Any:
    """``jax.lax.scan``, without traces where nothing in the loop reads them."""
    def as_written() -> Any:
        return original(f, init, xs, length=length, reverse=reverse, unroll=unroll, **options)

    if not loops_are_watched() or options or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return as_written()
    steps = _length(xs, length)
    try:
        body = _Body(f, init, xs) if steps > 1 else None
    except Exception:  # a body that cannot be traced is the original's to complain about
        body = None
    if body is None or not owners_in(body.closed.jaxpr):
        return as_written()
    learners: Sequence[Learner] = ()
    window, out, block_products = None, None, 0
    try:
        analysis = Analysis(flatten(body.closed), len(body.init))
        analysis.learners = learners = [
            dataclasses.replace(
                one, reason=one.reason or why_short(one.owner, one.lanes, steps) or '')
            for one in analysis.learners]
        loop = _DeferredLoop(original, body, analysis, steps, reverse, unroll)
        if loop.learners:
            out, window, block_products = loop(), loop.window, loop.block_products
    except Exception as err:  # what is chosen automatically never fails, and says why it was not
        learners = [dataclasses.replace(one, reason=one.reason or f'{type(err).__name__}: {err}')
                    for one in learners]
    if learners:
        _report(learners, steps, window, block_products)
    return as_written() if out is None else out


def _length(xs: Any, length: int | None) -> int:
    leaves = jax.tree.leaves(xs)
    if length is None and leaves and jnp.ndim(leaves[0]):
        return int(jnp.shape(leaves[0])[0])
    return length or 0


def _report(learners: Sequence[Learner], steps: int, window: int | None,
            block_products: int) -> None:
    loop = Loop(
        where=_caller(), steps=steps, window=window, block_products=block_products,
        deferred=tuple(_name(one.owner) for one in learners if not one.reason),
        kept=tuple((_name(one.owner), one.reason) for one in learners if one.reason),
        events=tuple(dict.fromkeys(
            name for one in learners if not one.reason for name in event_weights(one.owner))))
    _known.pop(loop, None)
    _known[loop] = None
    if len(_known) > _MOST:
        _known.pop(next(iter(_known)))
    seen = watching.get()
    if seen is not None:
        seen.append(loop)


def _name(learner: Any) -> str:
    return f'{type(learner).__name__} of {type(learner.graph_executor.model).__name__}'


_LIBRARIES = ('jax', 'brainstate', 'braintrace', 'brainpy', 'saiunit', 'traceops', 'contextlib',
              'functools')


def _caller() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get('__name__', '').split('.')[0] not in _LIBRARIES:
            code = frame.f_code
            return f'{code.co_filename}:{frame.f_lineno} in {code.co_qualname}'
        frame = frame.f_back
    return 'unknown'


class _Body:
    """A loop's body as a program of flat arguments."""

    def __init__(self, f: Callable[..., Any], init: Any, xs: Any) -> None:
        self.init, self.tree = jax.tree.flatten(init)
        self.xs, xs_tree = jax.tree.flatten(xs)
        self.out_tree: Any = None

        def flat(*args: Any) -> Any:
            carry, out = f(self.tree.unflatten(args[:len(self.init)]),
                           xs_tree.unflatten(args[len(self.init):]))
            leaves, tree = jax.tree.flatten(carry)
            if tree != self.tree:
                raise TypeError('the carry changes its structure')
            outputs, self.out_tree = jax.tree.flatten(out)
            return (*leaves, *outputs)

        slices = [jax.eval_shape(lambda a: a[0], a) for a in self.xs]
        self.closed = jax.make_jaxpr(flat)(*self.init, *slices)
        if not self._closes():
            # a number of Python takes the type that it becomes, as in jax
            self.init = [
                jnp.asarray(a, out.dtype) if given.weak_type else a for a, given, out in zip(
                    self.init, self.closed.in_avals, self.closed.out_avals, strict=False)]
            self.closed = jax.make_jaxpr(flat)(*self.init, *slices)
            if not self._closes():
                raise TypeError('the carry changes its type')

    def _closes(self) -> bool:
        n = len(self.init)
        return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(
            self.closed.in_avals[:n], self.closed.out_avals[:n], strict=True))


class _DeferredLoop:
    """The loop without the traces of the learners whose gradients wait; call it to run it."""

    def __init__(self, original: Callable[..., Any], body: _Body, analysis: Analysis,
                 steps: int, reverse: bool, unroll: Any) -> None:
        self.original, self.body, self.analysis = original, body, analysis
        self.steps, self.reverse, self.unroll = steps, reverse, unroll
        learners = analysis.deferred
        self.kept = Kept(analysis, learners)
        self.learners = [Deferred(one) for one in learners]
        gone = {i for one in learners for i in (*one.trace, *one.filters)}
        fixed = {i for i, v in enumerate(analysis.entering) if v is analysis.leaving[i]}
        self.sums = [i for i in range(analysis.carries) if self.kept.untouched(i)]
        self.fixed = sorted(fixed)
        self.live = [i for i in range(analysis.carries)
                     if i not in gone and i not in fixed and i not in self.sums]
        self.wanted = [*(analysis.leaving[i] for i in self.live),
                       *analysis.flat.outputs[analysis.carries:],
                       *(v for one in self.learners for v in one.reads)]
        self.window = self._choose_window() if learners else 0
        self.block_products = 0               # known once it has run

    def __call__(self) -> Any:
        # differentiated from outside, the loop is the one that was written
        run = jax.custom_jvp(self._run)
        run.defjvp(lambda primals, tangents: jax.jvp(self._as_written, primals, tangents))
        with unwatched():
            out = run(list(self.body.closed.consts), list(self.body.init), list(self.body.xs))
        n = self.analysis.carries
        return self.body.tree.unflatten(out[:n]), self.body.out_tree.unflatten(out[n:])

    def _as_written(self, consts: Any, init: Any, xs: Any) -> list[Any]:
        jaxpr, n = self.body.closed.jaxpr, self.analysis.carries

        def body(carry: Any, x: Any) -> Any:
            out = jax.core.eval_jaxpr(jaxpr, consts, *carry, *x)
            return out[:n], out[n:]
        carry, ys = self.original(body, init, xs, length=self.steps, reverse=self.reverse,
                                  unroll=self.unroll)
        return [*carry, *ys]

    # -- the new loop ------------------------------------------------------------------------

    def _step(self, constants: dict[Value, Any], carry: Any, x: Any,
              blocks: dict[Value, list[Any]]) -> Any:
        live, inners = carry
        analysis = self.analysis
        env = dict(constants)
        env.update(zip((analysis.entering[i] for i in self.live), live, strict=True))
        env.update(zip(analysis.flat.inputs[analysis.carries:], x, strict=True))
        self.kept.run(env, self.wanted, blocks)
        new = [read(env, analysis.leaving[i]) for i in self.live]
        ys = [read(env, v) for v in analysis.flat.outputs[analysis.carries:]]
        both = [one.digest(inner, env) for one, inner in zip(self.learners, inners, strict=True)]
        return (new, [inner for inner, _ in both]), (ys, [record for _, record in both])

    def _constants(self, consts: Any, init: Any) -> dict[Value, Any]:
        return {**dict(zip(self.analysis.flat.constants, consts, strict=True)),
                **{self.analysis.entering[i]: init[i] for i in self.fixed}}

    def _choose_window(self) -> int:
        def step(consts: Any, init: Any, x: Any) -> Any:
            inners = [one.inner(one.entering(init)) for one in self.learners]
            return self._step(self._constants(consts, init),
                              ([init[i] for i in self.live], inners), x, {})[1][1]

        with unwatched():
            slices = [jax.eval_shape(lambda a: a[0], a) for a in self.body.xs]
            records = jax.eval_shape(step, self.body.closed.consts, self.body.init, slices)
        size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(records))
        return min(choose_window(self.steps, size, one.settings.window, one.rule.window_budget)
                   for one in self.learners)

    def _run(self, consts: Any, init: Any, xs: Any) -> list[Any]:
        constants = self._constants(consts, init)
        if self.reverse:
            xs = [jnp.flip(a, 0) for a in xs]
        forms = [form_of_loops(one.settings) for one in self.learners]
        blocks = {}
        if all(form['blocks'] for form in forms):
            blocks = self.kept.blocks(lambda v: self.kept.constant(v, dict(constants)))
        self.block_products = len(blocks)
        unroll = self.unroll
        if unroll == 1 and not isinstance(unroll, bool):        # True is to unroll all
            unroll = max(form['unroll'] for form in forms)

        def window(full: Any, xs_w: Any, count: int) -> Any:
            live, sums, carries = full
            inners = [one.inner(c) for one, c in zip(self.learners, carries, strict=True)]
            (live, _inners), (ys, records) = self.original(
                lambda c, x: self._step(constants, c, x, blocks), (live, inners), xs_w,
                length=count, unroll=unroll)
            solved, after = {}, []
            known = dict(constants)

            def constant(v: Value) -> Any:
                return self.kept.constant(v, known)

            for one, carry, inner, record in zip(self.learners, carries, _inners, records,
                                                 strict=True):
                grads, carry = one.close(carry, inner, record, constant)
                solved.update(grads)
                after.append(carry)
            total = self.kept.after(constant, solved)
            live = [a + total[i].astype(a.dtype) if i in total else a
                    for i, a in zip(self.live, live, strict=True)]
            sums = [a + total[i].astype(a.dtype) for i, a in zip(self.sums, sums, strict=True)]
            return (live, sums, after), ys

        full = ([init[i] for i in self.live], [init[i] for i in self.sums],
                [one.entering(init) for one in self.learners])
        full, ys = self._windows(window, full, xs)
        if self.reverse:
            ys = [jnp.flip(a, 0) for a in ys]
        return [*self._carry(full, init), *ys]

    def _windows(self, window: Callable[..., Any], full: Any, xs: Any) -> Any:
        whole, rest = divmod(self.steps, self.window)
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
        return [out[i] for i in range(self.analysis.carries)]
