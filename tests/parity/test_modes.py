# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""In every mode of jax a call does what it does upstream."""

import warnings

import jax
import pytest

from tests.parity.harness import Run, assert_close, assert_same_states, both, pair
from tests.parity.nets import NETS


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def outcome(call):
    """What a call returns, or the error that it raises."""
    def attempt(run):
        try:
            return call(run)
        except Exception as err:
            return err
    return attempt


@pytest.mark.usefixtures('compiled_quickly')
@pytest.mark.parametrize('rule, settings', [
    ('d_rtrl', {}), ('es', {}), ('es', {'two_phase': True})])
def test_strict_promotion(rule, settings):
    upstream, ours = pair(NETS['alif'], rule, 5, window=3, **settings)
    with jax.numpy_dtype_promotion('strict'):
        want, got = both(upstream, ours, Run.grad)
    assert ours.inner._last_call[0] == 'window'
    assert_close(want, got, 1e-5, nonzero=True)
    assert_same_states(upstream, ours, 1e-5)


@pytest.mark.parametrize('call', [
    Run.eager_grad, lambda run: run.learner.etrace_evolve(run.x, return_outputs=True),
    lambda run: run.learner(run.x[0])], ids=['grad', 'evolve', 'step'])
def test_without_jit(call):
    """The steps are Python's, one by one, or what upstream says instead."""
    upstream, ours = pair(NETS['vanilla'], 'd_rtrl', 2)
    with jax.disable_jit():
        want, got = both(upstream, ours, outcome(call))
    if isinstance(want, Exception):
        assert type(want) is type(got) and str(want) == str(got)
    else:
        assert_close(want, got, 0., nonzero=True)
        assert_same_states(upstream, ours, 0.)
    assert not ours.inner._recorder.active
