# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``sparse_trace_gradient``: what a synapse connects, looked up row by row.

A program owns a run of synapses and walks all rows (steps and samples), some at a time. As
synapses are in the order of their sources, most of a run read the same input; targets of a source
mostly ascend, and a row of the deltas stays in the cache while programs beside each other read it.
Nothing but the gradient is stored.
"""

import triton
import triton.language as tl

__all__ = ['sparse_trace_gradient']


@triton.jit
def sparse_trace_gradient(inputs, delta, sources, targets, R, K, out, I: tl.constexpr,
                          O: tl.constexpr, G: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """Of ``[lanes / G, R, G, I]`` and ``[lanes / G, R, G, O]``: ``out``, ``[lanes, K]``."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    lane = tl.program_id(1)
    i = tl.load(sources + k, mask=k < K, other=0)
    o = tl.load(targets + k, mask=k < K, other=0)
    # the rows of a lane lie together, or between those of the G lanes (samples) of a step
    rows = tl.cast(lane // G, tl.int64) * R * G + lane % G
    acc = tl.zeros((BR, BK), tl.float32)
    for first in range(0, R, BR):
        r = first + tl.arange(0, BR)
        at = rows + r * G
        live = (r[:, None] < R) & (k[None, :] < K)
        x = tl.load(inputs + at[:, None] * I + i[None, :], mask=live, other=0.)
        d = tl.load(delta + at[:, None] * O + o[None, :], mask=live, other=0.)
        acc += x * d
    tl.store(out + tl.cast(lane, tl.int64) * K + k, tl.sum(acc, 0), mask=k < K)
