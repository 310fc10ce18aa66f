# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Steps of small networks in plain JAX, for the tests of ``simulate_window``.

Weights and inputs are multiples of 1/64 that are not large: a sum of them is the same in every
order, so that a spike is one for every backend.
"""

import jax
import jax.numpy as jnp
import numpy as np

I = 12      # noqa: E741


def exact(seed, *shape, largest=64):
    """Multiples of 1/64."""
    draw = np.random.default_rng(seed).integers(-largest, largest + 1, shape)
    return jnp.asarray(draw / 64., jnp.float32)


def spikes_of(x):
    return (x >= 0.).astype(x.dtype)


def joined(*parts):
    return jnp.concatenate(parts, -1)


def lif(constants, slices, states):
    """Leaky integrate and fire, with a reset by subtraction; the threshold is of each neuron."""
    (W, b, threshold), (x,), (V,) = constants, slices, states
    spikes = spikes_of(V - threshold)
    V = V - spikes
    V = V + .0625 * (-V + joined(x, spikes) @ W + b)
    return [V], [V]


def alif(constants, slices, states):
    """The threshold goes up with each spike."""
    (W, b, threshold), (x,), (V, a) = constants, slices, states
    spikes = spikes_of(V - threshold - .125 * a)
    V, a = V - spikes, a + spikes
    V = V + .0625 * (-V + joined(x, spikes) @ W + b)
    a = a - a * .03125
    return [V, a], [V, spikes]


def refractory(constants, slices, states):
    """A neuron that has fired does not for two steps; a leak that is a number at each step."""
    (W, b, threshold), (x, leak), (V, since) = constants, slices, states
    fires = (V >= threshold) & (since > 2.)
    spikes = fires.astype(V.dtype)
    V = jnp.where(fires, 0., V + .125 * (x @ W[:I] + spikes @ W[I:] - leak * V + b))
    return [V, jnp.where(fires, 0., since + 1.)], [V, since]


def dropout(constants, slices, states):
    """Half of what is sent is dropped, by numbers of a key that is split at each step."""
    (W, b, threshold), (x,), (V, key, turn) = constants, slices, states
    key, sub = jax.random.split(jax.random.wrap_key_data(key))
    spikes = spikes_of(V - threshold)
    there = jax.random.bernoulli(sub, .5, V.shape)
    V = V - spikes
    V = V + .0625 * (-V + joined(x, jnp.where(there, 2. * spikes, 0.)) @ W + b + turn % 3)
    return [V, jax.random.key_data(key), turn + 1], [V, there.astype(V.dtype)]


def lateral(constants, slices, states):
    """All neurons of a sample are inhibited by how many fire; spikes of any height."""
    (W, b, threshold), (x,), (V,) = constants, slices, states
    spikes = spikes_of(V - threshold) * 1.5
    V = .5 * (V - spikes) + joined(x, spikes) @ W + b - spikes.sum(-1, keepdims=True)
    return [V], [V, spikes.sum(-1)]


def synapses(constants, slices, states):
    """Currents that decay, and a conductance."""
    (W, b, threshold), (x,), (V, g, h) = constants, slices, states
    spikes = spikes_of(V - threshold)
    h = .75 * h + joined(x, spikes) @ W
    g = .5 * g + .25 * h
    V = .875 * (V - spikes) + g * (1. - .125 * V) + b
    return [V, g, h], [V, g]


def two_layers(constants, slices, states):
    """The second layer reads the spikes of the first of the same step, and its own."""
    (W, b, threshold), (x,), (V, U) = constants, slices, states
    n = V.shape[-1]
    first = spikes_of(V - threshold)
    V = .875 * (V - first) + joined(x, first) @ W + b
    second = spikes_of(U - threshold)
    U = .75 * (U - second) + spikes_of(V - threshold) @ W[I:] + second @ W[-n:]
    return [V, U], [V, U]


def gru(constants, slices, states):
    """Two gates that read the same, and one that waits for them."""
    (W, b, threshold), (x,), (h,) = constants, slices, states
    W = .25 * W
    z = jax.nn.sigmoid(joined(x, h) @ W + b)
    r = jax.nn.sigmoid(joined(x, h) @ (W * threshold))
    new = jnp.tanh(joined(x, r * h) @ jnp.flip(W, 1))
    h = (1. - z) * h + z * new
    return [h], [h, z]


def lstm(constants, slices, states):
    (W, b, threshold), (x,), (h, c) = constants, slices, states
    W = .25 * W
    i, f, o = (jax.nn.sigmoid(joined(x, h) @ w) for w in (W, W * threshold, jnp.flip(W, 0)))
    c = f * c + i * jnp.tanh(joined(x, h) @ jnp.flip(W, 1) + b)
    h = o * jnp.tanh(c)
    return [h, c], [h, c]


#: Name to (step, states, slices beside the input).
STEPS = {f.__name__: (f, states, more) for f, states, more in (
    (lif, 1, 0), (alif, 2, 0), (refractory, 2, 1), (lateral, 1, 0), (synapses, 3, 0),
    (two_layers, 2, 0), (gru, 1, 0), (lstm, 2, 0))}

#: Thresholds at which nobody fires, about half do, and all.
RATES = {'none': np.inf, 'some': .5, 'all': -np.inf}


def operands_of(name, T=7, batch=(3,), N=20, rate='some', seed=0):
    """``(step, constants, slices, states)``."""
    step, states, more = STEPS[name]
    gated = name in ('gru', 'lstm')
    threshold = jnp.full((N,), .75 if gated else RATES[rate], jnp.float32)
    inputs = jnp.abs(exact(seed + 2, T, *batch, I, largest=4)) * 16.
    return (step, [exact(seed, I + N, N), exact(seed + 1, N), threshold],
            [inputs, *(exact(seed + 3, T) for _ in range(more))],
            [exact(seed + 4 + i, *batch, N) for i in range(states)])
