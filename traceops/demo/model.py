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
    """Spikes of the inputs -> recurrent adaptive neurons -> leaky rates."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int) -> None:
        super().__init__()
        self.feedforward = braintrace.nn.Linear(
            n_in, n_hidden, w_init=braintools.init.Normal(0. * u.mA, 1.4 * u.mA),
            b_init=braintools.init.ZeroInit(unit=u.mA))
        self.recurrent = braintrace.nn.Linear(
            n_hidden, n_hidden, w_init=braintools.init.Normal(
                0. * u.mA, n_hidden ** -0.5 * u.mA),
            b_init=None)
        self.neuron = brainpy.state.ALIF(
            n_hidden, R=20. * u.ohm, tau=20. * u.ms, tau_a=200. * u.ms, beta=0.1 * u.mV,
            V_th=1. * u.mV, V_reset=0. * u.mV, V_rest=0. * u.mV,
            spk_fun=braintools.surrogate.ReluGrad(), spk_reset='soft')
        self.readout = braintrace.nn.LeakyRateReadout(
            n_hidden, n_out, tau=20. * u.ms, w_init=braintools.init.KaimingNormal())

    def update(self, spikes: Any) -> Any:
        current = self.feedforward(spikes) + self.recurrent(self.neuron.get_spike())
        return self.readout(self.neuron(current))


def make_trainer(learner: Any, model: Any, batch: int, rate: float,
                 total: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``train(spikes, labels) -> (loss, gradients)`` and ``simulate(spikes)``.

    Adam, with a learning rate that falls from ``rate`` to zero over ``total`` batches.
    """
    schedule = braintools.optim.CosineAnnealingLR(base_lr=rate, T_max=total)
    optimizer = braintools.optim.Adam(schedule)
    optimizer.register_trainable_weights(learner.param_states)

    @brainstate.transform.jit
    def train(spikes: Any, labels: Any) -> Any:
        brainstate.nn.reset_all_states(learner, batch_size=batch)

        def loss(now: Any) -> Any:
            rates = learner(now)
            return braintools.metric.softmax_cross_entropy_with_integer_labels(
                rates, labels).mean()

        judged = jnp.arange(len(spikes)) >= len(spikes) // 2     # half the digit has been seen
        grads, value = learner.etrace_grad(
            spikes, step_fn=loss, mask=judged, return_value=True, loss_output='scalar')
        optimizer.update(grads)
        schedule.step()
        return value, grads

    @brainstate.transform.jit
    def simulate(spikes: Any) -> Any:
        brainstate.nn.reset_all_states(model, batch_size=batch)
        return brainstate.transform.for_loop(
            lambda now: (model(now), model.neuron.get_spike()), spikes)

    return train, simulate
