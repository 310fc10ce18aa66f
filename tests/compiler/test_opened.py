# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Primitives that stand for programs, written out: what they compute is computed once."""

import braintools
import jax
import jax.numpy as jnp

from traceops.compiler.jaxpr import inlined
from traceops.compiler.opened import opened
from traceops.host.upstream import SPIKE, stands_for_a_program


def test_spikes_and_their_derivative_have_one_product():
    """jax differentiates the primitive of spikes without it, and leaves it beside that."""
    surrogate, weights = braintools.surrogate.ReluGrad(), jnp.ones((3, 2))

    def step(v):
        spikes, slope = jax.jvp(surrogate, (v,), (jnp.ones_like(v),))
        return spikes @ weights, jax.jit(surrogate)(v) @ weights, slope

    v = jnp.asarray([[0.5, -0.5, 0.1]])
    closed = jax.make_jaxpr(step)(v)
    assert SPIKE in str(closed)
    found = inlined(opened(closed, stands_for_a_program))
    names = [eqn.primitive.name for eqn in found.jaxpr.eqns]
    assert SPIKE not in names and names.count('dot_general') == 1
    for a, b in zip(step(v), jax.core.eval_jaxpr(found.jaxpr, found.consts, v), strict=True):
        assert a.any() and (a == b).all() and a.dtype == b.dtype
