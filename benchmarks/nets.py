# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark nets, written as people write them with brainstate and brainpy."""

from __future__ import annotations

from typing import Any

import brainpy
import brainstate
import braintools
import braintrace
import jax.numpy as jnp
import saiunit as u

__all__ = ['Gated', 'Spiking', 'TwoLayer', 'make', 'neurons']


def neurons(n: int, adaptive: bool = False) -> Any:
    """Leaky integrate-and-fire neurons, or adaptive ones."""
    kw: dict[str, Any] = dict(
        tau=20. * u.ms, R=1. * u.ohm, V_th=1. * u.mV, V_reset=0. * u.mV, V_rest=0. * u.mV,
        spk_fun=braintools.surrogate.ReluGrad(), spk_reset='soft')
    if adaptive:
        return brainpy.state.ALIF(n, tau_a=200. * u.ms, **kw)
    return brainpy.state.LIF(n, **kw)


def _linear(n_in: int, n_out: int) -> Any:
    return braintrace.nn.Linear(
        n_in, n_out, w_init=braintools.init.KaimingNormal(unit=u.mA),
        b_init=braintools.init.ZeroInit(unit=u.mA))


class Spiking(brainstate.nn.Module):
    """One recurrent layer of LIF or ALIF neurons and a leaky readout."""

    def __init__(self, n_in: int, n: int, n_out: int, adaptive: bool = False) -> None:
        super().__init__()
        self.linear = _linear(n_in + n, n)
        self.neuron = neurons(n, adaptive)
        self.readout = braintrace.nn.LeakyRateReadout(
            n, n_out, tau=20. * u.ms, w_init=braintools.init.KaimingNormal())

    def update(self, spikes: Any) -> Any:
        self.neuron(self.linear(jnp.concatenate([spikes, self.neuron.get_spike()], axis=-1)))
        return self.readout(self.neuron.get_spike())


class TwoLayer(brainstate.nn.Module):
    """Two recurrent ALIF layers and a leaky readout."""

    def __init__(self, n_in: int, n: int, n_out: int) -> None:
        super().__init__()
        self.linear1, self.neuron1 = _linear(n_in + n, n), neurons(n, True)
        self.linear2, self.neuron2 = _linear(n + n, n), neurons(n, True)
        self.readout = braintrace.nn.LeakyRateReadout(
            n, n_out, tau=20. * u.ms, w_init=braintools.init.KaimingNormal())

    @property
    def neuron(self) -> Any:
        """The layer whose spikes are counted."""
        return self.neuron2

    def update(self, spikes: Any) -> Any:
        s1, s2 = self.neuron1.get_spike(), self.neuron2.get_spike()
        self.neuron1(self.linear1(jnp.concatenate([spikes, s1], axis=-1)))
        now = self.neuron1.get_spike() * 20.
        self.neuron2(self.linear2(jnp.concatenate([now, s2], axis=-1)))
        return self.readout(self.neuron2.get_spike())


class Gated(brainstate.nn.Module):
    """A GRU or LSTM cell and a linear readout."""

    def __init__(self, cell: str, n_in: int, n: int, n_out: int) -> None:
        super().__init__()
        kind = {'gru': braintrace.nn.GRUCell, 'lstm': braintrace.nn.LSTMCell}[cell]
        self.rnn, self.out = kind(n_in, n), braintrace.nn.Linear(n, n_out)

    def update(self, x: Any) -> Any:
        return self.out(self.rnn(x))


def make(kind: str, n_in: int, n: int, n_out: int) -> Any:
    """A net by name: ``lif``, ``alif``, ``two-alif``, ``gru``, ``lstm``."""
    if kind in ('lif', 'alif'):
        return Spiking(n_in, n, n_out, adaptive=kind == 'alif')
    return TwoLayer(n_in, n, n_out) if kind == 'two-alif' else Gated(kind, n_in, n, n_out)
