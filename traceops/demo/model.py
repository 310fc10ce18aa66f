# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The network and its training: nothing here knows traceops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainpy
import brainstate
import braintools
import braintrace
import jax.numpy as jnp
import saiunit as u

__all__ = ['SpikingNet', 'make_trainer']


class SpikingNet(brainstate.nn.Module):
    """One recurrent layer of adaptive spiking neurons and a leaky readout."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int) -> None:
        super().__init__()
        self.linear = braintrace.nn.Linear(
            n_in + n_hidden, n_hidden,
            w_init=braintools.init.KaimingNormal(scale=8., unit=u.mA),
            b_init=braintools.init.ZeroInit(unit=u.mA))
        self.neuron = brainpy.state.ALIF(
            n_hidden, tau=20. * u.ms, tau_a=100. * u.ms, R=1. * u.ohm, V_th=1. * u.mV,
            V_reset=0. * u.mV, V_rest=0. * u.mV, beta=0.1 * u.mV,
            spk_fun=braintools.surrogate.ReluGrad(), spk_reset='soft')
        self.readout = braintrace.nn.LeakyRateReadout(
            n_hidden, n_out, tau=20. * u.ms, w_init=braintools.init.KaimingNormal())

    def update(self, spikes: Any) -> Any:
        drive = jnp.concatenate([spikes, self.neuron.get_spike()], axis=-1)
        self.neuron(self.linear(drive))
        return self.readout(self.neuron.get_spike())


def make_trainer(learner: Any, model: Any, batch: int,
                 rate: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``train(spikes, labels) -> (loss, gradients)`` and ``predict(spikes) -> labels``."""
    weights = model.states(brainstate.ParamState)
    optimizer = braintools.optim.Adam(lr=rate)
    optimizer.register_trainable_weights(weights)

    @brainstate.transform.jit
    def train(spikes: Any, labels: Any) -> Any:
        brainstate.nn.reset_all_states(model, batch_size=batch)
        learner.reset_state()

        def loss(inputs: Any) -> Any:
            out = learner(inputs)
            return braintools.metric.softmax_cross_entropy_with_integer_labels(out, labels).mean()

        judged = jnp.arange(spikes.shape[0]) >= spikes.shape[0] // 2     # half the digit is seen
        grads, value = learner.etrace_grad(
            spikes, step_fn=loss, mask=judged, return_value=True, loss_output='scalar')
        optimizer.update(grads)
        return value, grads

    @brainstate.transform.jit
    def predict(spikes: Any) -> Any:
        brainstate.nn.reset_all_states(model, batch_size=batch)
        outputs = brainstate.transform.for_loop(model, spikes)
        return jnp.argmax(outputs[spikes.shape[0] // 2:].sum(0), axis=-1)

    return train, predict
