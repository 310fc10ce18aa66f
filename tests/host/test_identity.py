# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A fast learner is of upstream's class, with upstream's states, names and files."""

import contextlib
import functools
import pickle

import brainstate
import braintools
import braintrace
import jax
import numpy as np
import orbax.checkpoint as orbax_checkpoint
import pytest

import traceops
from tests.parity.harness import start
from tests.parity.nets import NETS
from traceops.host.learners import is_fast

pytestmark = pytest.mark.usefixtures('compiled_quickly')

WAYS = {'upstream': contextlib.nullcontext, 'fast': traceops.enabled}


def made(way, vmap=False, steps=4, rule='d_rtrl'):
    with WAYS[way]():
        run = start(braintrace.compile, NETS['lif'], rule, steps, vmap)
    assert is_fast(run.learner) == (way == 'fast')
    return run


def names(node):
    """Of the states, but for the addresses that upstream keys traces by."""
    return sorted('.'.join('trace' if isinstance(part, tuple) else str(part) for part in path)
                  for path in brainstate.graph.states(node))


@pytest.mark.parametrize('vmap', [pytest.param(False, marks=pytest.mark.slow), True])
def test_type_states_and_graph_are_upstreams(vmap):
    runs = {way: made(way, vmap) for way in WAYS}
    for _ in range(2):
        seen = [(type(run.learner), type(run.inner), type(run.inner.graph_executor),
                 names(run.learner), names(run.inner), names(run.model), len(run.inner.states()),
                 len(brainstate.graph.nodes(run.learner)),
                 sorted(k for k, _ in brainstate.graph.iter_node(run.learner)))
                for run in runs.values()]
        assert seen[0] == seen[1]
        assert type(runs['fast'].inner) is braintrace.D_RTRL
        for run in runs.values():
            run.grad()
    assert runs['fast'].inner._last_call is not None


def test_class_by_pickle_by_dispatch_and_as_a_key():
    @functools.singledispatch
    def kind(learner):
        return 'anything'
    kind.register(braintrace.D_RTRL, lambda learner: 'D-RTRL')
    one = made('fast').inner
    assert pickle.loads(pickle.dumps(type(one))) is braintrace.D_RTRL
    assert kind(one) == 'D-RTRL' and {braintrace.D_RTRL: 1}[type(one)] == 1
    assert pickle.loads(pickle.dumps(traceops.D_RTRL)) is traceops.D_RTRL


def test_classes_that_watch_their_subclasses():
    """Nothing is derived from a class of the user's."""
    class Told(braintrace.D_RTRL):
        def __init_subclass__(cls, **kwargs):
            raise TypeError('no subclass of mine')

    class Meta(type(braintrace.D_RTRL)):
        made = []

        def __new__(mcs, *args, **kwargs):
            mcs.made.append(args[0])
            return super().__new__(mcs, *args, **kwargs)

    class Listed(braintrace.D_RTRL, metaclass=Meta):
        pass
    with traceops.enabled():
        for cls in (Told, Listed):
            one = cls(NETS['lif'].make())
            assert is_fast(one) and type(one) is cls
    assert Meta.made == ['Listed']


def msgpack(path, tree, like):
    braintools.file.msgpack_save(str(path / 'learner.msgpack'), tree)
    return braintools.file.msgpack_load(str(path / 'learner.msgpack'), like)


def orbax(path, tree, like):
    with orbax_checkpoint.StandardCheckpointer() as files:
        files.save(path / 'learner', tree)
        files.wait_until_finished()
        return files.restore(path / 'learner', like)


CASES = [(files, vmap, *ways) for files in (msgpack, orbax) for vmap in (False, True)
         for ways in (('upstream', 'fast'), ('fast', 'upstream'))]
QUICK = [(msgpack, True, 'fast', 'upstream'), (orbax, False, 'upstream', 'fast')]


@pytest.mark.parametrize('files, vmap, writer, reader', [
    *QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case not in QUICK)])
def test_a_checkpoint_of_one_is_read_by_the_other(tmp_path, files, vmap, writer, reader):
    """In the middle of a sequence: file, names and number, and what follows."""
    def values(run):        # traces by their place: upstream's own names differ between processes
        states = [*run.model.states().values(), *run.inner.etrace_bwg.values(),
                  run.inner.running_index]
        assert len(states) == len(brainstate.graph.states(run.inner))
        return states

    def saved(run):
        return {str(i): jax.tree.map(np.asarray, s.value) for i, s in enumerate(values(run))}

    def second_half(run):
        return brainstate.transform.jit(lambda: run.learner.etrace_grad(
            run.x[6:], run.y[6:], step_fn=run.loss, return_value=True))()
    one, two = made(writer, vmap, 12), made(reader, vmap, 12)
    brainstate.transform.jit(lambda: one.learner.etrace_grad(
        one.x[:6], one.y[:6], step_fn=one.loss))()
    read = files(tmp_path, saved(one), saved(two))
    for i, state in enumerate(values(two)):
        state.value = jax.tree.map(jax.numpy.asarray, read[str(i)])
    want, got = second_half(one), second_half(two)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert max(float(np.abs(a).max()) for a in jax.tree.leaves(want[0])) > 0
