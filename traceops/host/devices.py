# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""How the states of a learner are spread over devices, and what these have to exchange."""

from __future__ import annotations

from typing import Any

import brainstate
import jax
import numpy as np

from traceops.host.relations import weight_bytes

__all__ = ['described']


def described(learner: Any, lanes: bool, windowed: bool) -> list[str]:
    """What ``explain`` says of a learner whose hidden states lie on several devices.

    Parameters
    ----------
    learner : braintrace learner
    lanes : bool
        It runs under ``vmap``.
    windowed : bool
        The gradients of a window are formed together.
    """
    found = {'samples': 1, 'neurons': 1}
    info = learner.graph.module_info
    for path, invar in info.hidden_path_to_invar.items():
        try:
            (value, *_) = jax.tree.leaves(info.retrieved_model_states[path].value)
        except brainstate.BrainStateError:      # made in a jitted function, which is over
            continue
        if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
            continue
        # how often each axis is cut, of any sharding
        cuts = np.array(value.shape) // np.array(value.sharding.shard_shape(value.shape))
        of_samples = lanes or len(invar.aval.shape) > 1
        for axis, count in enumerate(cuts):
            what = 'samples' if of_samples and axis == 0 else 'neurons'
            found[what] = max(found[what], int(count))
    said = [f'{what} on {count} devices' for what, count in found.items() if count > 1]
    if found['samples'] > 1 and windowed:
        size = weight_bytes(learner) / found['neurons']
        said.append(f'one reduction of {_megabytes(size)} a window')
    return ['; '.join(said)] if said else []


def _megabytes(size: float) -> str:
    return f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.1f} kB'
