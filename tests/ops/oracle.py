# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The operations as loops over steps in NumPy float64: nothing in common with the package."""

import numpy as np


def adjoint_window(signal, jacobian, factors, kappa=None):
    L, D, fs = (np.asarray(signal, float), np.asarray(jacobian, float),
                [np.asarray(f, float) for f in factors])
    T = L.shape[0]
    deltas = [np.zeros(L.shape[:-1]) for _ in fs]
    arriving, filtered = np.zeros(L.shape[1:]), np.zeros(L.shape[1:])
    for t in range(T - 1, -1, -1):
        now = L[t] if kappa is None else L[t] + filtered
        filtered = np.zeros_like(now) if kappa is None else kappa * now
        adjoint = now + arriving
        for delta, f in zip(deltas, fs, strict=True):
            delta[t] = (adjoint * f[t]).sum(-1)
        arriving = np.einsum('...ij,...i->...j', D[t], adjoint)
    return (tuple(deltas), arriving) if kappa is None else (tuple(deltas), arriving, filtered)


def leaving_window(jacobian, factors, kappa=None):
    D, fs = np.asarray(jacobian, float), [np.asarray(f, float) for f in factors]
    T, S = D.shape[0], D.shape[-1]
    products, P, low_pass = [np.zeros(f.shape) for f in fs], np.zeros(D.shape[1:]), np.eye(S)
    for t in range(T - 1, -1, -1):
        P = P + low_pass
        low_pass = (kappa or 0.) * low_pass
        for p, f in zip(products, fs, strict=True):
            p[t] = np.einsum('...ij,...j->...i', P, f[t])
        P = np.einsum('...ij,...jk->...ik', P, D[t])
    return tuple(products), tuple(p.sum(0) for p in products), P


def es_trace_window(signal, jacobian, factor, carry, decay_x, decay_f, correction):
    L, D, f, g, c = (np.asarray(a, float) for a in (signal, jacobian, factor, carry, correction))
    instant = np.zeros(L.shape[:-1])
    for t in range(L.shape[0]):
        g = decay_f * np.einsum('...ij,...j->...i', D[t], g) + (1 - decay_f) * f[t]
        instant[t] = (g * L[t]).sum(-1) / c[t]
    filtered, later = np.zeros_like(instant), np.zeros(instant.shape[1:])
    for t in range(L.shape[0] - 1, -1, -1):
        later = instant[t] + decay_x * later
        filtered[t] = later
    return filtered, instant.sum(0), g


def d_trace_window(trace, inputs, factor, transition, signal, gradient='entering'):
    e, x, p, M, L = (np.asarray(a, float) for a in (trace, inputs, factor, transition, signal))
    new = np.einsum('bosr,bior->bios', M, e)
    for t in range(x.shape[0]):
        new = new + x[t][:, :, None, None] * p[t][:, None]
    paired = {'entering': e, 'leaving': new, 'none': 0 * e}[gradient]
    return new, np.einsum('bos,bios->io', L, paired)


def trace_gradient(inputs, delta, total=None, by_sample=False):
    x, d = np.asarray(inputs, float), np.asarray(delta, float)
    out = np.einsum('tbi,tbo->bio' if by_sample else 'tbi,tbo->io', x, d)
    return out if total is None else out + np.asarray(total, float)
