# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What is made of spikes, by the program that makes it."""

import braintools
import jax
import jax.numpy as jnp
import pytest

from traceops.compiler.spikes import has_spikes
from traceops.host.upstream import SPIKE

surrogate = braintools.surrogate.ReluGrad()


@jax.custom_vjp
def own(v):
    return jnp.where(v > 0, 1., 0.)


own.defvjp(lambda v: (own(v), v), lambda v, g: (g * v,))


@jax.custom_jvp
def compared(v):
    return (v >= 1.).astype(float)


compared.defjvp(lambda v, dv: (compared(*v), dv[0]))

MADE = {
    'surrogate': surrogate, 'scaled': lambda v: 20. * surrogate(v) / 3.,
    'masked': lambda v: surrogate(v) * jnp.tanh(v),
    'beside': lambda v: jnp.concatenate([v, surrogate(v)]),
    'reshaped': lambda v: surrogate(v).reshape(2, 2).T[:, :1],
    'comparison': lambda v: (v > 1).astype(jnp.float32), 'own': compared,
    'in a call': lambda v: jax.jit(lambda v: surrogate(v) * 2.)(v),
    'through a call': lambda v: jax.jit(lambda v: v)(surrogate(v)),
    'chosen': own, 'chosen, scaled': lambda v: jnp.where(v > 1, 0., -2.) * 3.,
    'chosen arrays': lambda v: jnp.where(v > 0, jnp.ones_like(v), jnp.zeros_like(v)),
}
NOT_MADE = {
    'value': lambda v: v, 'squashed': jnp.tanh, 'summed': lambda v: surrogate(v) + v,
    'filtered': lambda v: jnp.cumsum(surrogate(v)), 'denominator': lambda v: v / surrogate(v),
    'constant': lambda v: jnp.ones(3), 'in a call': lambda v: jax.jit(jnp.tanh)(v),
    'chosen from no zero': lambda v: jnp.where(v > 0, 1., -1.),
    'chosen values': lambda v: jnp.where(v > 0, v, 0.), 'choosing': lambda v: jnp.where(v, 3., 2.),
}


@pytest.mark.parametrize('name', MADE)
def test_spikes_are_found(name):
    jaxpr = jax.make_jaxpr(MADE[name])(jnp.ones(4)).jaxpr
    assert has_spikes(jaxpr, jaxpr.outvars[0], SPIKE)


@pytest.mark.parametrize('name', NOT_MADE)
def test_what_is_none_is_not_taken_for_one(name):
    jaxpr = jax.make_jaxpr(NOT_MADE[name])(jnp.ones(4)).jaxpr
    assert not has_spikes(jaxpr, jaxpr.outvars[0], SPIKE)
