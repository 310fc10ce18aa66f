# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The nets of the parity tests: small, one per thing that can go wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import brainevent
import brainpy
import brainstate
import braintools
import braintrace
import jax
import jax.numpy as jnp
import numpy as np
import saiunit as u

N_IN, N, N_OUT = 3, 6, 2


def _weight(*shape: int, scale: float = 0.5) -> Any:
    return brainstate.ParamState(scale * brainstate.random.randn(*shape))


class Hidden(brainstate.nn.Module):
    """A leaky tanh layer ``h = a h + tanh(op)`` around any ETP op; readout is another layer."""

    shape: tuple[int, ...] = (N,)

    def __init__(self) -> None:
        super().__init__()
        self.make()
        self.out = braintrace.nn.Linear(N, N_OUT)

    def make(self) -> None:
        raise NotImplementedError

    def op(self, x: Any, h: Any) -> Any:
        raise NotImplementedError

    def init_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        size = self.shape if batch_size is None else (batch_size, *self.shape)
        self.h = brainstate.HiddenState(jnp.zeros(size))

    def read(self, h: Any) -> Any:
        return h

    def update(self, x: Any) -> Any:
        h = self.h.value
        self.h.value = 0.8 * h + jnp.tanh(self.op(x, h))
        return self.out(self.read(self.h.value))


class Vanilla(Hidden):
    def make(self) -> None:
        self.w, self.b = _weight(N_IN + N, N), _weight(N)

    def op(self, x: Any, h: Any) -> Any:
        return braintrace.matmul(jnp.concatenate([x, h], -1), self.w.value, self.b.value)


def _square(w: Any) -> Any:
    return w ** 2


class Transformed(Vanilla):
    def op(self, x: Any, h: Any) -> Any:
        return braintrace.matmul(jnp.concatenate([x, h], -1), self.w.value, self.b.value,
                                 weight_fn=jnp.sin, bias_fn=_square)


class Shared(Vanilla):
    """One parameter in two relations."""

    def make(self) -> None:
        self.w = _weight(N, N)
        self.lift = jnp.asarray(np.random.RandomState(0).randn(N_IN, N), dtype=float)

    def op(self, x: Any, h: Any) -> Any:
        return (braintrace.matmul(h, self.w.value)
                + braintrace.matmul(x @ self.lift, self.w.value))


class Lora(Hidden):
    def make(self) -> None:
        self.B, self.A, self.b = _weight(N_IN + N, 2), _weight(2, N), _weight(N)

    def op(self, x: Any, h: Any) -> Any:
        return braintrace.lora_matmul(jnp.concatenate([x, h], -1), self.B.value, self.A.value,
                                      alpha=0.7, bias=self.b.value)


class Sparse(Hidden):
    def make(self) -> None:
        dense = np.where(np.random.RandomState(1).rand(N_IN + N, N) < 0.5, 1., 0.)
        self.csr = brainevent.CSR.fromdense(jnp.asarray(dense, dtype=float))
        self.w = _weight(self.csr.data.shape[0])

    def op(self, x: Any, h: Any) -> Any:
        return braintrace.sparse_matmul(jnp.concatenate([x, h], -1), self.w.value,
                                        sparse_mat=self.csr)


class Embedding(Hidden):
    def make(self) -> None:
        self.table = _weight(5, N)

    def op(self, x: Any, h: Any) -> Any:
        return braintrace.embedding(x, self.table.value) + 0.3 * h


class Grouped(Hidden):
    shape = (2, 3)

    def make(self) -> None:
        self.w, self.b = _weight(2, 3, 3), _weight(2, 3)

    def op(self, x: Any, h: Any) -> Any:
        return braintrace.grouped_matmul(h + x[..., None, :], self.w.value, self.b.value)

    def read(self, h: Any) -> Any:
        return h.reshape(*h.shape[:-2], -1)


class Einsum(Hidden):
    shape = (2, 3)
    equation = 'bgi,gij->bgj'

    def make(self) -> None:
        self.w = _weight(2, 3, 3)

    def op(self, x: Any, h: Any) -> Any:
        return braintrace.einsum(self.equation, h + x[..., None, :], self.w.value)

    def read(self, h: Any) -> Any:
        return h.reshape(*h.shape[:-2], -1)


class SharedAxis(Einsum):
    equation = 'bgi,ij->bgj'

    def make(self) -> None:
        self.w = _weight(3, 3)


class Elementwise(Hidden):
    """A recurrence that is diagonal, so that D-RTRL is exact."""

    def make(self) -> None:
        self.decay, self.w = _weight(N), _weight(N_IN, N)

    def op(self, x: Any, h: Any) -> Any:
        return braintrace.element_wise(self.decay.value) * h + braintrace.matmul(x, self.w.value)


class Conv(Hidden):
    shape = (3, 2)

    def make(self) -> None:
        self.k, self.b = _weight(3, 2, 2), _weight(2)

    def op(self, x: Any, h: Any) -> Any:
        return braintrace.conv(h + x[..., :, None], self.k.value, self.b.value, strides=(1,),
                               padding='SAME', dimension_numbers=('NWC', 'WIO', 'NWC'))

    def read(self, h: Any) -> Any:
        return h.reshape(*h.shape[:-2], -1)


class Noisy(Vanilla):
    """A random key that advances at every step."""

    def op(self, x: Any, h: Any) -> Any:
        return super().op(x, h) + 0.1 * brainstate.random.randn(*h.shape)


class Chain(Hidden):
    """``S`` coupled states per position."""

    def __init__(self, S: int) -> None:
        self.S = S
        super().__init__()

    def make(self) -> None:
        self.w = _weight(N_IN + N, N)

    def init_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        size = self.shape if batch_size is None else (batch_size, *self.shape)
        for i in range(self.S):
            setattr(self, f'h{i}', brainstate.HiddenState(jnp.zeros(size)))

    def update(self, x: Any) -> Any:
        hs = [getattr(self, f'h{i}') for i in range(self.S)]
        old = [h.value for h in hs]
        y = braintrace.matmul(jnp.concatenate([x, old[0]], -1), self.w.value)
        hs[0].value = 0.7 * old[0] - 0.2 * jnp.sin(old[-1]) + jnp.tanh(y)
        for i in range(1, self.S):
            hs[i].value = 0.6 * old[i] + 0.5 * jnp.tanh(old[i - 1]) + 0.1 * y
        return self.out(sum(h.value for h in hs))


class TwoGroups(Hidden):
    """One op that drives two hidden groups, one state wide and two states wide."""

    def make(self) -> None:
        self.w, self.b = _weight(N_IN + N, N), _weight(N)

    def init_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        super().init_state(batch_size, **kwargs)
        self.fast, self.slow = (brainstate.HiddenState(jnp.zeros_like(self.h.value))
                                for _ in range(2))

    def update(self, x: Any) -> Any:
        h, fast, slow = self.h.value, self.fast.value, self.slow.value
        y = braintrace.matmul(jnp.concatenate([x, h], -1), self.w.value, self.b.value)
        self.h.value = 0.8 * h + jnp.tanh(y)
        self.fast.value = 0.5 * fast + jnp.sin(y) - 0.1 * slow
        self.slow.value = 0.9 * slow + 0.3 * fast * y
        return self.out(self.h.value + self.fast.value * self.slow.value)


class Plain(Vanilla):
    """Parameters that no ETP op reads, in the recurrence and outside it."""

    def make(self) -> None:
        super().make()
        self.v, self.gain = _weight(N, N), _weight(N)

    def op(self, x: Any, h: Any) -> Any:
        return super().op(x, h) + jnp.tanh(h @ self.v.value) * self.gain.value


class Bypass(Vanilla):
    """The output reads the previous hidden value beside the new one."""

    def update(self, x: Any) -> Any:
        before = self.h.value
        return super().update(x) + 0.5 * before[..., :N_OUT]


class Spiking(brainstate.nn.Module):
    def __init__(self, adaptive: bool = False) -> None:
        super().__init__()
        kw: dict[str, Any] = dict(
            tau=20. * u.ms, R=1. * u.ohm, V_th=1. * u.mV, V_reset=0. * u.mV, V_rest=0. * u.mV,
            spk_fun=braintools.surrogate.ReluGrad(), spk_reset='soft')
        self.linear = braintrace.nn.Linear(
            N_IN + N, N, w_init=braintools.init.KaimingNormal(unit=u.mA),
            b_init=braintools.init.ZeroInit(unit=u.mA))
        self.neuron = brainpy.state.ALIF(N, tau_a=200. * u.ms, **kw) if adaptive \
            else brainpy.state.LIF(N, **kw)
        self.readout = braintrace.nn.LeakyRateReadout(
            N, N_OUT, tau=20. * u.ms, w_init=braintools.init.KaimingNormal())

    def update(self, x: Any) -> Any:
        self.neuron(self.linear(jnp.concatenate([20. * x, self.neuron.get_spike()], axis=-1)))
        return self.readout(self.neuron.get_spike())


class TwoLayer(brainstate.nn.Module):
    """Two spiking layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Spiking(), Spiking(True)
        self.mix = braintrace.nn.Linear(N_OUT, N_IN)

    @property
    def neuron(self) -> Any:
        return self.second.neuron

    def update(self, x: Any) -> Any:
        return self.second(jnp.abs(self.mix(self.first(x))))


def gif(states: Any, current: dict[str, Any]) -> tuple[Any, ...]:
    """A GIF neuron of six states or more: its potential, three synapses by their conductance, two
    currents after spikes; then a threshold, and calcium.
    """
    v, e, i, n, fast, slow, *rest = states
    threshold, calcium = (*rest, *(jnp.zeros_like(v),) * (2 - len(rest)))
    spike = braintools.surrogate.ReluGrad()(v - 1. - threshold)
    drive = e * (2. - v) - i * (v + 1.) + n * (2. - v) / (1. + jnp.exp(-2. * v))
    new = (0.9 * v + 0.15 * (drive + fast - slow) - spike * (1. + threshold) - 0.1 * calcium,
           0.8 * e + current['e'], 0.7 * i + current['i'], 0.9 * n + 0.3 * current['e'],
           0.6 * fast + 0.4 * spike, 0.9 * slow + 0.3 * spike + 0.05 * v)
    after = 0.95 * threshold + 0.2 * spike, 0.9 * calcium + 0.2 * spike + 0.05 * e * v
    return (*new, *after[:len(rest)])


class Gif(Hidden):
    """Masked weights onto two of the synapses of a GIF neuron with ``S`` states."""

    def __init__(self, S: int) -> None:
        self.S = S
        super().__init__()

    def make(self) -> None:
        rng = np.random.RandomState(2)
        self.w = {k: brainstate.ParamState(jnp.asarray(scale * rng.rand(N_IN + N, N), float))
                  for k, scale in (('e', 0.5), ('i', 0.2))}
        self.masks = {k: jnp.asarray(rng.rand(N_IN + N, N) < 0.6, float) for k in self.w}
        self.read_by = jnp.asarray(rng.randn(N, N_OUT), float)

    def init_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        size = self.shape if batch_size is None else (batch_size, *self.shape)
        for i in range(self.S):
            setattr(self, f'h{i}', brainstate.HiddenState(jnp.zeros(size)))

    @staticmethod
    def inputs(x: Any, states: Any) -> dict[str, Any]:
        spikes = braintools.surrogate.ReluGrad()(states[0] - 1. - (
            states[6] if len(states) > 6 else 0.))
        both = jnp.concatenate([x, spikes], -1)
        return {'e': both, 'i': both}

    def output(self, states: Any) -> Any:
        return (states[0] + 0.3 * states[3] - 0.2 * states[5]) @ self.read_by

    def update(self, x: Any) -> Any:
        states = [getattr(self, f'h{i}') for i in range(self.S)]    # by name: one group
        old = [h.value for h in states]
        current = {k: braintrace.matmul(a, self.w[k].value, weight_fn=self.masks[k].__mul__)
                   for k, a in self.inputs(x, old).items()}
        for h, value in zip(states, gif(old, current), strict=True):
            h.value = value
        return self.output([h.value for h in states])


class Gated(brainstate.nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn, self.out = kind(N_IN, N), braintrace.nn.Linear(N, N_OUT)

    def update(self, x: Any) -> Any:
        return self.out(self.rnn(x))


@dataclasses.dataclass(frozen=True)
class Net:
    """A net, its inputs, and where upstream itself cannot go (with the reason)."""

    make: Callable[[], Any]
    spiking: bool = False
    tokens: bool = False
    not_vmapped: str = ''
    engine: str = 'window'

    def inputs(self, steps: int, batch: int) -> Any:
        rng = np.random.RandomState(3)
        if self.tokens:
            return jnp.asarray(rng.randint(0, 5, (steps, batch)))
        return jnp.asarray(rng.binomial(1, .5, (steps, batch, N_IN)) + 0. * rng.randn(), float)


_EINSUM = 'braintrace.einsum needs the batch axis in its equation'
_CONV = 'braintrace.conv needs the batch axis in its input'
NETS: dict[str, Net] = {
    'vanilla': Net(Vanilla), 'gru': Net(lambda: Gated(braintrace.nn.GRUCell)),
    'lstm': Net(lambda: Gated(braintrace.nn.LSTMCell)),
    'lif': Net(Spiking, spiking=True), 'alif': Net(lambda: Spiking(True), spiking=True),
    'two-layer': Net(TwoLayer, spiking=True), 'conv': Net(Conv, not_vmapped=_CONV),
    'sparse': Net(Sparse), 'lora': Net(Lora), 'embedding': Net(Embedding, tokens=True),
    'grouped': Net(Grouped), 'elementwise': Net(Elementwise),
    'einsum': Net(Einsum, not_vmapped=_EINSUM),
    'shared-axis': Net(SharedAxis, not_vmapped=_EINSUM, engine='upstream'),
    'shared-weight': Net(Shared), 'transformed': Net(Transformed), 'noisy': Net(Noisy),
    'three-states': Net(lambda: Chain(3)), 'four-states': Net(lambda: Chain(4)),
    'five-states': Net(lambda: Chain(5)), 'two-groups': Net(TwoGroups), 'bypass': Net(Bypass),
    'plain': Net(Plain),
}


def spike_rate(net: Net, x: Any) -> float:
    """Spikes per neuron and step."""
    brainstate.random.seed(0)
    model = net.make()
    brainstate.nn.init_all_states(model, batch_size=x.shape[1])

    def step(i: Any) -> Any:
        model(i)
        return (jax.nn.relu(model.neuron.V.value / u.mV - 1.) > 0).mean()
    return float(brainstate.transform.for_loop(step, x).mean())
