# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The form of the loops over time is settled where a program is lowered."""

import re

import brainstate
import braintrace
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

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture
def gpus(monkeypatch):
    """As where programs for a GPU can be made."""
    found = choice.importlib.util.find_spec
    choice.devices_needed.cache_clear()
    monkeypatch.setattr(choice.importlib.util, 'find_spec',
                        lambda name, *more: name.startswith('jax_cuda') or found(name, *more))
    yield
    choice.devices_needed.cache_clear()


def a_call(rule, net='alif', steps=12, **settings):
    training = of_case(Case('one', net, rule, 24, None, steps=steps, batch=4))
    call = online(training, traceops.compile, backend='jax', **settings)
    return pure(call, training.inputs, training.targets), (training.inputs, training.targets)


def an_evolution(rule, net='alif', steps=12, **settings):
    training = of_case(Case('one', net, rule, 24, None, steps=steps, batch=4))
    with traceops.configured(backend='jax', **settings):
        learner = traceops.compile(
            training.model, rule, training.inputs[0], **training.options)
    evolve = lambda x, _: learner.etrace_evolve(x, return_outputs=True)  # noqa: E731
    return pure(evolve, training.inputs, 0.), (training.inputs, 0.)


def a_loop(rule, net='lif', steps=12, **settings):
    one = loops.LoopCase('one', Case('one', net, rule, 24, None, steps=steps, batch=4,
                                     vmap=steps == 12))
    given = data(one.case)
    with traceops.enabled(backend='jax', **settings):
        return pure(loops.train_step(one), *given), given


#: Of few steps, upstream's are as fast on a CPU: there the program is upstream's.
PROGRAMS = [(a_call, 'ES_D_RTRL', 'alif', 3), (a_loop, 'ES_D_RTRL', 'lif', 3),
            *(pytest.param(*row, marks=pytest.mark.slow) for row in (
                (a_call, 'ES_D_RTRL', 'alif', 12), (a_call, 'D_RTRL', 'lif', 2),
                (a_call, 'D_RTRL', 'alif', 12), (an_evolution, 'D_RTRL', 'lif', 3),
                (an_evolution, 'D_RTRL', 'alif', 12), (an_evolution, 'ES_D_RTRL', 'alif', 12),
                (a_loop, 'ES_D_RTRL', 'lif', 12),
                (a_loop, 'D_RTRL', 'lif', 12)))]


@pytest.mark.parametrize('make, rule, net, steps', PROGRAMS)
def test_the_form_is_that_of_the_platform_that_a_program_is_for(make, rule, net, steps, gpus):
    """Of one trace: on a CPU what it is there to the bit, for a GPU what is asked for by name."""
    brainstate.environ.set(dt=1. * u.ms)

    def exported(made, platform):
        (function, states), given = made
        return export.export(jax.jit(function), platforms=[platform])(states, *given)

    def loops_of(made, platform):
        text = exported(made, platform).mlir_module()
        return len(re.findall('stablehlo.while', text)), text.count('optimization_barrier')

    chosen, by_step, at_once = (make(rule, net, steps, **form) for form in (
        {}, {'two_phase': False}, {'two_phase': True}))
    assert loops_of(chosen, 'cpu') == loops_of(by_step, 'cpu')
    assert loops_of(chosen, 'cuda') == loops_of(at_once, 'cuda') != loops_of(by_step, 'cuda')
    results = [jax.jit(function)(states, *given) for (function, states), given in
               (chosen, by_step)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    types = [jax.eval_shape(function, states, *given) for (function, states), given in
             (chosen, by_step)]
    assert [*map(str, jax.tree.leaves(types[0]))] == [*map(str, jax.tree.leaves(types[1]))]
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(results[0]))


def test_outside_jit_a_short_call_is_traced_once(gpus):
    """There the device is known, and one way is all that is traced."""
    training = of_case(Case('one', 'lif', 'ES_D_RTRL', 24, None, steps=3, batch=4))
    traced = []

    def calls_of(compiler):
        learner = compiler(training.model, 'ES_D_RTRL', training.inputs[0], batch_size=4,
                           decay_or_rank=.9)
        traced.clear()
        learner.etrace_grad(training.inputs, step_fn=lambda x: traced.append(x) or (
            learner(x) ** 2).mean())
        return len(traced)
    assert calls_of(traceops.compile) == calls_of(braintrace.compile)
