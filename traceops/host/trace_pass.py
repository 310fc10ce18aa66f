# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The D-RTRL trace over a window: what it owes to the signals, and what leaves."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from traceops.host import upstream
from traceops.host.relations import RelationView, stack_rows, stack_states
from traceops.host.rule import Carry, Grads, whole, with_every_step
from traceops.host.sparse import Synapses
from traceops.host.transforms import slope, used
from traceops.ops import d_trace_start, d_trace_window, leaving_window

__all__ = ['TracePass', 'pair_by_sample', 'pair_dense']


class TracePass:
    r"""Over the trace of a learner, and with ``kappa`` over its low-pass as well.

    Each leaves as one update of rank T, :math:`e_T = M e_0 + \sum_s x_s \otimes p_s`, of which
    the sum is multiplied by the derivative of what transforms a weight; ops without a closed
    form take upstream's own step, T times.

    Parameters
    ----------
    learner : braintrace learner
    views : tuple of RelationView
    lanes : bool
        It runs under ``vmap``.
    kappa : float or None
        Low-pass coefficient of the trace.
    """

    def __init__(self, learner: Any, views: tuple[RelationView, ...], lanes: bool,
                 kappa: float | None) -> None:
        self.learner, self.views, self.lanes = learner, views, lanes
        self.decay = {'trace': None, **({'filter': kappa} if kappa is not None else {})}
        self.backend = learner.traceops_settings.backend
        self.keys = learner._recorder.keys
        #: Relations whose op has no closed form.
        self.stepped = [v for v in views if not v.has_closed_form(learner)]
        self.closed = [v for v in views if v not in self.stepped]

    @property
    def states(self) -> dict[str, Any]:
        """The learner's own, by name and key."""
        states = {'trace': self.learner.etrace_bwg,
                  'filter': getattr(self.learner, '_trace_filters', {})}
        return {name: self.keys.ours(states[name]) for name in self.decay}

    @property
    def bytes(self) -> int:
        """Of the trace, of all lanes."""
        return self._copies * sum(
            upstream.trace_bytes(self.learner, v.relation, g)
            for v in self.views for g in v.relation.hidden_groups)

    @property
    def _copies(self) -> int:
        return int(self.learner._lanes) if self.lanes else 1

    @property
    def factor_bytes(self) -> int:
        """Of the inputs and outputs that a trace in closed form is made of, of one step."""
        avals = [(v.relation.y_var.aval, g.num_state) for v in self.closed
                 for g in v.relation.hidden_groups]
        avals += [(v.relation.x_var.aval, 1) for v in self.closed if v.has_input]
        return self._copies * sum(
            a.size * a.dtype.itemsize * states for a, states in avals)

    def leaving(self, carry: Carry, record: Any) -> dict[str, Any]:
        """What each trace is made of when it leaves, by group (see :func:`leaving_window`)."""
        found: dict[str, Any] = {name: {} for name in self.decay}
        for name, kappa in self.decay.items():
            for g in dict.fromkeys(g for v in self.closed for g in v.groups):
                factors = [record['f'][v.factor_key(g)] for v in self.closed if g in v.groups]
                found[name][g] = leaving_window(
                    *with_every_step(record, (record['D'][g], factors)), kappa=kappa,
                    start=not carry, backend=self.backend)
        return found

    def __call__(self, carry: Carry, signals: Any, record: Any, leaving: dict[str, Any],
                 weight_vals: Any) -> tuple[Grads, Carry]:
        """Gradients and the traces that leave.

        Parameters
        ----------
        carry : dict
            The traces that enter; empty where they are zero.
        signals : list of lists of arrays ``[..., S]``, or None
            What pairs with each trace that enters, a signal for each group; ``None``: nothing.
        record : dict
            ``x`` of the window, ``[T, ...]``; for what is stepped, ``f`` and ``D`` too.
        leaving : dict
            As :meth:`leaving` gives it.
        weight_vals : dict
            Values of the parameters.
        """
        grads: Grads = {}
        new: Carry = {name: {} for name in self.decay}
        states = self.states['trace']
        paired = dict(zip(self.decay, signals, strict=True)) if carry and signals else {}
        for name, kappa in self.decay.items():
            for g, (factors, totals, transition) in leaving[name].items():
                feeding = [v for v in self.closed if g in v.groups]
                for view, p, total in zip(feeding, factors, totals, strict=True):
                    key, x = view.trace_key(g), record['x'].get(view.x_key)
                    old = carry['trace'][key] if carry else None
                    signal = paired['trace'][g] if name == 'trace' and paired else None
                    update = (functools.partial(self._matrices, weight_vals)
                              if view.of_matrices else
                              self.dense if view.is_dense else
                              functools.partial(self._sparse, weight_vals) if view.is_sparse
                              else functools.partial(self._low_rank, weight_vals)
                              if view.is_low_rank else self._by_rule)
                    like = states[key].value
                    # a trace that is the learner's own state is an argument of the program,
                    # which has to stay; one that a loop over windows carries is overwritten
                    owned = old is not None and any(old[k] is like[k] for k in like)
                    e, named = update(view, like, x, (p, total), transition, old, signal,
                                      in_place=not owned)
                    if kappa is not None and carry:
                        before = carry[name][key]
                        e = {k: a + kappa ** p.shape[0] * before[k] for k, a in e.items()}
                    new[name][key] = {k: e[k].astype(a.dtype) for k, a in like.items()}
                    if named is not None:
                        view.add_to(grads, weight_vals, named)
        if self.stepped:
            self._step(self.stepped, carry, record, weight_vals, new)
        for name in paired:
            rest = [v for v in self.views
                    if v in self.stepped or name != 'trace'
                    or not (v.is_dense or v.is_sparse)]
            self.pair(rest, carry[name], paired[name], weight_vals, grads)
        return grads, new

    def dense(self, view: RelationView, like: Any, x: Any, leaving: Any, transition: Any, old: Any,
              signal: Any, in_place: bool = True,
              ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        r"""Matrix weights (and their bias): one operation, samples and lanes as one batch.

        ``leaving``: :math:`p_s = D_T \cdots D_{s+1} f_s` of every step, and their sum;
        ``in_place``: as :func:`~traceops.ops.d_trace_window` takes it.
        """
        p, total = leaving
        T, S = p.shape[0], p.shape[-1]
        x = x.reshape(T, -1, x.shape[-1]).astype(p.dtype)
        p = p.reshape(T, x.shape[1], -1, S)
        total = total.reshape(p.shape[1:])
        if old is None:
            new = {'weight': d_trace_start(x, p, backend=self.backend),
                   'bias': total}
            return {k: new[k].reshape(like[k].shape) for k in like}, None
        M = transition.reshape(*p.shape[1:], S)
        L = jnp.zeros_like(p[0]) if signal is None else signal.reshape(p.shape[1:])
        e, dW = d_trace_window(old['weight'].reshape(*x.shape[1:], *p.shape[2:]), x, p, M, L,
                               gradient='none' if signal is None else 'entering',
                               in_place=in_place, backend=self.backend)
        new, named = {'weight': e}, {'weight': dW}
        if 'bias' in old:
            b = old['bias'].reshape(p.shape[1:])
            new['bias'] = sum(M[..., j] * b[..., j:j + 1] for j in range(S)) + total
            named['bias'] = (L * b).sum((0, -1))
        new = {k: a.reshape(old[k].shape) for k, a in new.items()}
        return new, None if signal is None else named

    def _matrices(self, weight_vals: Any, view: RelationView, like: Any, x: Any, leaving: Any,
                  transition: Any, old: Any, signal: Any, in_place: bool = True,
                  ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Matrix weights that the op transforms: what enters went through the transform already.

        Those of groups are so many more samples.
        """
        one_hot = upstream.x_representation(view.relation)
        x = x if one_hot is None else one_hot(x)
        new, _ = self.dense(view, like, x, leaving, None, None, None)
        weights = upstream.weights_of(view.relation, weight_vals)
        new = {k: a * slope(view.relation, weights, k)[..., None] for k, a in new.items()}
        paired = old is not None and signal is not None and view.is_dense
        return _with_entering(new, transition, old), pair_dense(old, signal) if paired else None

    def _low_rank(self, weight_vals: Any, view: RelationView, like: Any, x: Any, leaving: Any,
                  transition: Any, old: Any, signal: Any,
                  in_place: bool = True) -> tuple[dict[str, Any], None]:
        r"""Two matrices, :math:`y = \alpha\, x\, b(B)\, a(A)`: the trace of the first is that of
        their product (a signal finds :math:`B` through :math:`A`), that of the second has
        :math:`\alpha\, x\, b(B)` for its input.
        """
        weights = upstream.weights_of(view.relation, weight_vals)
        between = view.relation.eqn_params['alpha'] * x @ used(view.relation, weights, 'lora_b')
        whole = {'weight': like['lora_b'], **({'bias': like['bias']} if 'bias' in like else {})}
        new, _ = self.dense(view, whole, x, leaving, None, None, None)
        second, _ = self.dense(view, {'weight': like['lora_a']}, between, leaving, None, None, None)
        new = {'lora_b': new.pop('weight'), 'lora_a': second['weight'], **new}
        for k in ('lora_a', 'bias'):
            if k in like:
                new[k] = new[k] * slope(view.relation, weights, k)[..., None]
        return _with_entering(new, transition, old), None

    def _sparse(self, weight_vals: Any, view: RelationView, like: Any, x: Any, leaving: Any,
                transition: Any, old: Any, signal: Any,
                in_place: bool = True) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Synapses (and the bias of their targets), samples and lanes as one batch."""
        p, total = leaving
        synapses, S = Synapses.of(view.relation), p.shape[-1]
        p = p.reshape(p.shape[0], -1, synapses.outputs, S)
        total = total.reshape(p.shape[1:])
        new = {'weight': jnp.stack([
            synapses.sampled(x, p[..., s], self.backend, by_sample=True, events=view.of_events)
            for s in range(S)], -1),
            'bias': total}
        weights = upstream.weights_of(view.relation, weight_vals)
        new = {k: new[k] * slope(view.relation, weights, k)[..., None] for k in like}
        named = None
        if old is not None:
            at = {'weight': (slice(None), synapses.ends), 'bias': ()}
            M = transition.reshape(*p.shape[1:], S)
            entering = {k: a.reshape(new[k].shape) for k, a in old.items()}
            new = {k: a + sum(M[at[k]][..., j] * entering[k][..., j:j + 1] for j in range(S))
                   for k, a in new.items()}
            if signal is not None:
                L = signal.reshape(p.shape[1:])
                named = {k: (L[at[k]] * e).sum((0, -1)) for k, e in entering.items()}
        return {k: a.reshape(like[k].shape) for k, a in new.items()}, named

    def _by_rule(self, view: RelationView, like: Any, x: Any, leaving: Any, transition: Any,
                 old: Any, signal: Any, in_place: bool = True) -> tuple[dict[str, Any], None]:
        """Through upstream's own closed form for the op.

        The products with the Jacobians are in ``p`` already, so its rule is called with
        one-by-one identities in their place (which XLA removes).
        """
        rules, p = upstream.rules_of(view.relation), leaving[0]
        if transition is None:
            transition = jnp.zeros((*p.shape[1:], p.shape[-1]), p.dtype)

        def update(x: Any, p: Any, M: Any, old: Any) -> dict[str, Any]:
            one, S = jnp.ones((1,) * (p.ndim + 1), p.dtype), range(p.shape[-1])
            start = {k: jnp.zeros((1,) * (a.ndim - self.lanes), a.dtype)
                     for k, a in like.items()}
            if old is not None:
                terms = [[rules.recurrent(M[..., i, j, None, None],
                                          {k: a[..., j:j + 1] for k, a in old.items()}, 1)
                          for j in S] for i in S]
                start = {k: jnp.concatenate([sum(t[k] for t in row) for row in terms], -1)
                         for k in old}
            return rules.chunk(x, p, one, one[0], start, 1)

        if self.lanes:
            update = jax.vmap(update, in_axes=(1, 1, 0, 0))
        return update(x, p, transition, old), None

    def pair(self, views: Any, trace: Any, signals: Any, weight_vals: Any,
             grads: Grads) -> None:
        """Add what traces owe to their signals."""
        def solve(trace: Any, signals: Any) -> Any:
            return upstream.solve_param_dim(
                self.learner, [v.relation for v in views], self.keys.upstreams(trace), signals,
                weight_vals)

        with _quiet():
            more = jax.vmap(solve)(trace, signals) if self.lanes else solve(trace, signals)
        for path, value in more.items():
            value = jax.tree.map(lambda a: a.sum(0), value) if self.lanes else value
            grads[path] = jax.tree.map(jnp.add, grads[path], value) if path in grads else value

    def _step(self, views: Any, carry: Carry, record: Any, weight_vals: Any, new: Carry) -> None:
        """Ops without a closed form upstream: its own step, T times (its own cost)."""
        relations = [v.relation for v in views]
        keys = [v.trace_key(g) for v in views for g in v.groups]
        start = {name: {k: carry[name][k] if carry else states[k].value for k in keys}
                 for name, states in self.states.items()}
        record = whole({k: record[k] for k in ('x', 'f', 'D')})
        xs = (record['x'], {k: stack_states(f) for k, f in record['f'].items()},
              [stack_rows(D) for D in record['D']])

        def roll(traces: Carry, factors: Any) -> Carry:
            trace, x, f = self.keys.upstreams((traces['trace'], *factors[:2]))
            e = self.keys.ours(upstream.roll_step(
                self.learner, relations, weight_vals, trace, (x, f, factors[2])))
            rolled = {'trace': e}
            if 'filter' in traces:
                rolled['filter'] = jax.tree.map(
                    lambda a, b: self.decay['filter'] * a + b, traces['filter'], e)
            return rolled

        def body(traces: Carry, factors: Any) -> tuple[Carry, None]:
            return (jax.vmap(roll) if self.lanes else roll)(traces, factors), None

        with _quiet():
            rolled = jax.lax.scan(body, start, xs)[0]
        for name, traces in rolled.items():
            new[name].update(traces)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Upstream's rules under our ``vmap``: what it says of compiling ops is not of this."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'ETP primitive .* was decomposed')
        yield


def _with_entering(new: dict[str, Any], transition: Any,
                   old: dict[str, Any] | None) -> dict[str, Any]:
    """What a window adds to traces ``[..., I, O, S]`` (of a bias ``[..., O, S]``), and what enters
    it times ``transition``, ``[..., O, S, S]``."""
    if old is None:
        return new
    S = transition.shape[-1]
    M = transition.reshape(-1, *transition.shape[-3:])
    for k, a in new.items():
        rows = k != 'bias'
        entering = old[k].reshape(-1, *old[k].shape[-2 - rows:])
        carried = sum((M[:, None] if rows else M)[..., j] * entering[..., j:j + 1]
                      for j in range(S))
        new[k] = a + carried.reshape(a.shape)
    return new


def pair_dense(trace: dict[str, Any], signal: Any) -> dict[str, Any]:
    """What a matrix's trace (and its bias's) owes to a signal, state by state."""
    S = signal.shape[-1]
    e = trace['weight'].astype(signal.dtype)
    e, L = e.reshape(-1, *e.shape[-3:]), signal.reshape(-1, e.shape[-2], S)
    pairs: Any = sum(L[:, None, :, s] * e[..., s] for s in range(S))
    named = {'weight': pairs.sum(0)}
    if 'bias' in trace:
        b = trace['bias'].astype(signal.dtype).reshape(L.shape)
        named['bias'] = (L * b).sum((0, -1))
    return named


def pair_by_sample(trace: dict[str, Any], signal: Any) -> dict[str, Any]:
    """The same, a sample after the other, each added to a sum that stays in cache."""
    samples = {k: a.reshape(-1, *a.shape[-2 - (k == 'weight'):]) for k, a in trace.items()}
    signal = signal.reshape(-1, *signal.shape[-2:])

    def one(total: Any, sample: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, pair_dense(*sample)), None

    # an empty sum: zeros that are placed on devices as the operands are
    start = pair_dense({k: a[:0] for k, a in samples.items()}, signal[:0])
    given = {k: a[:, None] for k, a in samples.items()}, signal[:, None]
    return jax.lax.scan(one, start, given)[0]
