# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The suite of ``simulate_window``, which takes a step and not arrays alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.steps import STEPS, dropout, operands_of
from tests.ops.suites.base import in_turn
from traceops import ops
from traceops.kernels.simulate_window import launch


def agree(got, want, tolerance):
    """By norm; what is nothing is nothing."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_array_equal(np.isinf(a), np.isinf(b))
        a, b = (np.where(np.isfinite(v), v, 0.) for v in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def by_loop(step, constants, slices, states):
    """One step after another, each by itself."""
    kept = []
    for t in range(slices[0].shape[0]):
        states, k = step(constants, [a[t] for a in slices], states)
        kept.append(k)
    return states, [jnp.stack(a) for a in zip(*kept, strict=True)]


def fired(kept):
    return bool(np.ptp(np.asarray(kept[0])) > 0)


@pytest.mark.usefixtures('compiled_quickly')
class SimulateWindowSuite:
    """``simulate_window``: every backend inherits it."""

    backend = 'jax'
    tolerance = 1e-6

    def run(self, step, constants, slices, states):
        return ops.simulate_window(step, constants, slices, states, backend=self.backend)

    def matches(self, *operands):
        got = jax.jit(lambda *a: self.run(operands[0], *a))(*operands[1:])
        want = by_loop(*operands)
        agree(got, want, self.tolerance)
        return want

    @pytest.mark.parametrize('name', STEPS)
    def test_matches_a_loop(self, name):
        (states, kept) = self.matches(*operands_of(name))
        assert fired(kept) and all(np.asarray(s).any() for s in states)

    @pytest.mark.parametrize('name, T', in_turn(['lif', 'two_layers', 'gru'], [1, 2, 13], part=3))
    def test_any_number_of_steps(self, name, T):
        self.matches(*operands_of(name, T=T))

    @pytest.mark.parametrize('size, name', in_turn(
        [(1, (3,)), (33, (1,)), (100, (33,)), (128, (2,)), (20, ()), (20, (2, 3))],
        ['alif', 'lateral', 'lstm'], part=3))
    def test_any_size(self, name, size):
        N, batch = size
        self.matches(*operands_of(name, T=4, N=N, batch=batch))

    @pytest.mark.parametrize('name, rate', in_turn(
        ['lif', 'alif', 'refractory', 'lateral', 'synapses', 'two_layers'], ['none', 'all']))
    def test_nobody_fires_and_all_do(self, name, rate):
        self.matches(*operands_of(name, rate=rate))

    def test_no_step_and_no_sample(self):
        states, kept = self.run(*operands_of('lif', T=0))
        assert kept[0].shape == (0, 3, 20)
        agree(states, operands_of('lif', T=0)[3], 0.)
        _, kept = self.run(*operands_of('lif', batch=(0,)))
        assert kept[0].shape == (7, 0, 20)

    @pytest.mark.parametrize('mapped', [(None, 0, 0), (None, 1, None), (None, None, 0),
                                        (0, None, None)], ids=str)
    def test_vmap(self, mapped):
        """Lanes are samples; those with weights of their own share the loop, or no launch."""
        step, constants, slices, states = operands_of('alif')
        given = []
        for arrays, axis in zip((constants, slices, states), mapped, strict=True):
            given.append(arrays if axis is None else [
                jnp.stack([a, .5 * a, a[..., ::-1]], axis) for a in arrays])
        got = jax.vmap(lambda *a: self.run(step, *a), mapped)(*given)
        one = [by_loop(step, *(
            arrays if axis is None else [jnp.take(a, k, axis) for a in arrays]
            for arrays, axis in zip(given, mapped, strict=True))) for k in range(3)]
        agree(got, jax.tree.map(lambda *a: jnp.stack(a), *one), self.tolerance)

    @pytest.mark.parametrize('mapped', [False, True])
    def test_random_numbers_are_drawn_ahead(self, mapped):
        """Of keys that no neuron feeds; a counter beside them."""
        _, constants, slices, states = operands_of('lif')
        states = [*states, jax.random.key_data(jax.random.key(3)), jnp.int32(4)]
        if not mapped:
            got = self.matches(dropout, constants, slices, states)
            assert 0. < np.asarray(got[1][1]).mean() < 1.
            return
        many = [jnp.stack([a, a[..., ::-1] if a.ndim else a + 1]) for a in states]
        got = jax.vmap(lambda s: self.run(dropout, constants, slices, s))(many)
        one = [by_loop(dropout, constants, slices, [a[k] for a in many]) for k in range(2)]
        agree(got, jax.tree.map(lambda *a: jnp.stack(a), *one), self.tolerance)

    def test_nested_vmap_is_one_call(self):
        step, constants, slices, states = operands_of('lif')
        many = jax.tree.map(lambda a: jnp.stack([jnp.stack([a, .5 * a])] * 3), (slices, states))
        mapped = jax.vmap(jax.vmap(lambda x, s: self.run(step, constants, x, s)))
        agree(mapped(*many), jax.vmap(jax.vmap(lambda x, s: by_loop(step, constants, x, s)))(*many),
              self.tolerance)
        names = [e.primitive.name for e in jax.make_jaxpr(mapped)(*many).jaxpr.eqns]
        assert names.count('etp_simulate_window') == 1 and 'scan' not in names

    def test_gradient(self):
        """Through the reference, whatever the backend."""
        step, constants, slices, states = operands_of('gru')

        def loss(run):
            return lambda c, x, s: sum((a ** 2).sum() for a in jax.tree.leaves(
                run(step, c, x, s)))
        got = jax.grad(loss(self.run), (0, 1, 2))(constants, slices, states)
        want = jax.grad(loss(by_loop), (0, 1, 2))(constants, slices, states)
        agree(got, want, 1e-5)
        assert all(np.asarray(g).any() for g in jax.tree.leaves(want))

    def test_what_is_known_ahead_is_not_simulated(self):
        """Kept of each step, and a state that is only the last input."""
        def step(constants, slices, states):
            (W, b, _), (x,), (V, last) = constants, slices, states
            drive = jnp.tanh(x @ W[:x.shape[-1]])
            V = .5 * V + drive + b
            return [V, drive], [V, drive, b * 2., V > last]

        _, constants, slices, states = operands_of('lif')
        self.matches(lambda *a: (lambda after, kept: (after, kept[:3]))(*step(*a)),
                     constants, slices, [*states, states[0]])

    def test_weights_that_are_transposed_or_of_half_the_bytes(self):
        def step(constants, slices, states):
            (W, U), (x,), (V,) = constants, slices, states
            spikes = (V >= .5).astype(V.dtype)
            product = jax.lax.dot_general(spikes, U, (((1,), (1,)), ((), ())))
            V = .5 * V + product
            return [V + jnp.concatenate([x, spikes], -1) @ W.astype(V.dtype)], [V]

        _, (W, *_), slices, states = operands_of('lif')
        half = [W.astype(jnp.bfloat16), W[12:].T]
        self.matches(step, half, slices, states)
        simulation = ops.Simulation(step, half, slices, states)
        call = launch.plan(*simulation.operands, step=simulation.step, capability=90)
        given = [a.dtype for a in call.prepare(simulation.operands) if a.shape[-2:] == W.shape]
        assert given == [jnp.bfloat16]          # read as it is

    def test_not_finite(self):
        """Inputs and states that are no numbers come out as such. Of a weight that is infinite:
        the loop meets it at every step, a list of events when its neuron fires.
        """
        step, constants, slices, states = operands_of('lif', rate='none')
        slices = [slices[0].at[3, 1, 2].set(np.inf)]
        _, kept = self.matches(step, constants, slices, states)
        assert np.isnan(np.asarray(kept[0])[4:, 1]).any()
        step, constants, slices, states = operands_of('gru')
        self.matches(step, constants, slices, [states[0].at[0, 0].set(np.nan)])

    #: Elementwise operations beside those of the networks, and where they are tried.
    ELEMENTWISE = {
        'cosh': jnp.cosh, 'erf': jax.scipy.special.erf, 'exp2': jnp.exp2, 'expm1': jnp.expm1,
        'floor': jnp.floor, 'log1p': lambda x: jnp.log1p(jnp.abs(x)), 'power': lambda x: x ** 1.5,
        'log': lambda x: jnp.log(jnp.abs(x) + .1), 'max': lambda x: jnp.maximum(x, .25),
        'min': lambda x: jnp.minimum(x, .25), 'relu': jax.nn.relu, 'clip': lambda x: x.clip(-1, 1),
        'rsqrt': lambda x: jax.lax.rsqrt(jnp.abs(x) + .1), 'sign': jnp.sign, 'sin': jnp.sin,
        'cos': jnp.cos, 'sinh': jnp.sinh, 'softplus': jax.nn.softplus, 'cube': lambda x: x ** 3,
        'inverse': lambda x: (x + 9.) ** -2, 'finite': lambda x: jnp.isfinite(x) * x,
        'not': lambda x: jnp.where(~(x > 0.) ^ (x > 1.), x, -x), 'sqrt': lambda x: jnp.sqrt(x + 9.),
        'ceil': jnp.ceil, 'elu': jax.nn.elu, 'abs': jnp.abs,
        'negative power': lambda x: x ** -3., 'integers': lambda x: (x > 0).astype(int) * x}

    def test_elementwise(self):
        def step(constants, slices, states):
            (x,), (V,) = slices, states
            return [.5 * V + x], [f(V) for f in self.ELEMENTWISE.values()]

        x = exact_inputs(6, 3, 40)
        _, got = self.run(step, [], [x], [x[0]])
        _, want = by_loop(step, [], [x], [x[0]])
        for name, a, b in zip(self.ELEMENTWISE, got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6, err_msg=name)


def exact_inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).integers(-128, 128, shape) / 64., jnp.float32)
