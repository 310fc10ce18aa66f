# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""One training step is one program, at whatever addresses its variables lie."""

import jax
import pytest

import traceops
from tests.parity.harness import start
from tests.parity.nets import NETS
from traceops.benchmarks import measure
from traceops.benchmarks.cases import Case
from traceops.benchmarks.loops import LoopCase, train_step

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def small(net, rule, vmap):
    return Case('small', net, rule, 8, None, steps=4, batch=2, vmap=vmap, n_in=5, n_out=3)


def program(call, x, y):
    function, states = measure.pure(call, x, y)
    return jax.jit(function).lower(states, x, y).as_text()


def in_windows(case):
    return measure.online(measure.of_case(case), traceops.compile, window=2)


def in_a_loop(case):
    return train_step(LoopCase(case.name, case))


@pytest.mark.parametrize(('make', 'case'), [
    (in_windows, small('two-alif', 'D_RTRL', False)),
    pytest.param(in_windows, small('lif', 'ES_D_RTRL', True), marks=pytest.mark.slow),
    (in_a_loop, small('lif', 'ES_D_RTRL', True))])
def test_every_learner_of_a_net_has_the_same_program(make, case):
    x, y = measure.data(case)
    with traceops.enabled():
        alive = [make(case) for _ in range(3)]              # so all at addresses of their own
        assert len({program(call, x, y) for call in alive}) == 1


@pytest.mark.parametrize('rule', ['d_rtrl', 'es', 'eprop'])
def test_keys_are_upstreams_by_another_name(rule):
    one, other = (start(traceops.compile, NETS['two-layer'], rule, 2).inner for _ in range(2))
    for learner in (one, other):
        keys = learner._recorder.keys
        for name in ('etrace_bwg', '_trace_filters', 'etrace_xs', 'etrace_dfs'):
            states = getattr(learner, name, {})
            assert keys.upstreams(keys.ours(states)) == states
    tapes = [jax.tree.structure(learner._recorder._blank()) for learner in (one, other)]
    assert tapes[0] == tapes[1]
    states = getattr(one, 'etrace_bwg', None) or one.etrace_xs
    with pytest.raises(KeyError, match='not of this learner'):
        other._recorder.keys.ours(states)
