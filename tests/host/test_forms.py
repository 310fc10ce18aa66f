# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The form of the loops over time is settled where a program is lowered."""

import re

import brainstate
import jax
import numpy as np
import pytest
import saiunit as u
from jax import export

import traceops
from traceops.benchmarks import loops
from traceops.benchmarks.cases import Case
from traceops.benchmarks.measure import data, of_case, online, pure
from traceops.ops import choice


@pytest.fixture
def gpus(monkeypatch):
    """As where programs for a GPU can be made."""
    found = choice.importlib.util.find_spec
    choice.devices_needed.cache_clear()
    monkeypatch.setattr(choice.importlib.util, 'find_spec',
                        lambda name, *more: name.startswith('jax_cuda') or found(name, *more))
    yield
    choice.devices_needed.cache_clear()


def a_call(rule, **settings):
    training = of_case(Case('one', 'alif', rule, 24, None, steps=12, batch=4))
    call = online(training, traceops.compile, backend='jax', **settings)
    return pure(call, training.inputs, training.targets), (training.inputs, training.targets)


def an_evolution(rule, **settings):
    training = of_case(Case('one', 'alif', rule, 24, None, steps=12, batch=4))
    learner = traceops.compile(training.model, rule, training.inputs[0], backend='jax',
                               batch_size=4, **settings)
    evolve = lambda x, _: learner.etrace_evolve(x, return_outputs=True)  # noqa: E731
    return pure(evolve, training.inputs, 0.), (training.inputs, 0.)


def a_loop(rule, **settings):
    one = loops.LoopCase('one', Case('one', 'lif', rule, 24, None, steps=12, batch=4, vmap=True))
    given = data(one.case)
    with traceops.enabled(backend='jax', **settings):
        return pure(loops.train_step(one), *given), given


PROGRAMS = [(a_call, 'ES_D_RTRL'), *(pytest.param(*row, marks=pytest.mark.slow) for row in (
    (a_call, 'D_RTRL'), (an_evolution, 'D_RTRL'), (a_loop, 'ES_D_RTRL'), (a_loop, 'D_RTRL')))]


@pytest.mark.parametrize('make, rule', PROGRAMS)
def test_the_form_is_that_of_the_platform_that_a_program_is_for(make, rule, gpus):
    """Of one trace: on a CPU what it is there to the bit, for a GPU what is asked for by name."""
    brainstate.environ.set(dt=1. * u.ms)

    def exported(made, platform):
        (function, states), given = made
        return export.export(jax.jit(function), platforms=[platform])(states, *given)

    def loops_of(made, platform):
        text = exported(made, platform).mlir_module()
        return len(re.findall('stablehlo.while', text)), text.count('optimization_barrier')

    chosen, by_step, at_once = make(rule), make(rule, two_phase=False), make(rule, two_phase=True)
    assert loops_of(chosen, 'cpu') == loops_of(by_step, 'cpu')
    assert loops_of(chosen, 'cuda') == loops_of(at_once, 'cuda') != loops_of(by_step, 'cuda')
    results = [jax.jit(function)(states, *given) for (function, states), given in
               (chosen, by_step)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    types = [jax.eval_shape(function, states, *given) for (function, states), given in
             (chosen, by_step)]
    assert [*map(str, jax.tree.leaves(types[0]))] == [*map(str, jax.tree.leaves(types[1]))]
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(results[0]))
