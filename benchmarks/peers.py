# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The same recurrent LIF net by BPTT in the libraries that people would use instead.

One recurrent layer and a leaky readout, cross-entropy at every step, one gradient. Neurons reset by
subtraction where a library has that; the strength of the input is set so that each net spikes as
often as ours. Libraries are looked for when asked for: none is needed to run the rest.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from traceops.benchmarks import measure
from traceops.benchmarks.cases import Case

__all__ = ['CASES', 'PEERS', 'Peer', 'markdown', 'missing', 'run']

CASES = (Case('LIF 128', 'lif', 'D_RTRL', 128, None), Case('LIF 1024', 'lif', 'D_RTRL', 1024, None))

#: exp(-dt / tau) of neurons and readout, dt = 1 ms and tau = 20 ms.
DECAY = float(np.exp(-1 / 20))


@dataclasses.dataclass
class Peer:
    """A net of a library: ``gradient()`` computes one, ``rate(drive)`` is its firing rate.

    Attributes
    ----------
    gradient : callable
        ``(drive) -> None``: one gradient, complete when it returns.
    rate : callable
        ``(drive) -> spikes a neuron and step`` where the input is multiplied by ``drive``.
    memory : callable
        ``(drive) -> bytes`` that the gradient needs beside weights and inputs.
    """

    gradient: Callable[[float], Any]
    rate: Callable[[float], float]
    memory: Callable[[float], int]


def _torch_peer(case: Case, neuron_of: Callable[[Any], Any]) -> Peer:
    """``neuron_of(torch)`` gives ``(start, step)``: ``step(current, state) -> (spikes, state)``."""
    torch: Any = importlib.import_module('torch')
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() and jax.default_backend() == 'gpu' else 'cpu'
    start, step = neuron_of(torch)
    layers = torch.nn.ModuleList([torch.nn.Linear(case.n_in, case.n),
                                  torch.nn.Linear(case.n, case.n, bias=False),
                                  torch.nn.Linear(case.n, case.n_out)]).to(device)
    torch.nn.init.zeros_(layers[0].bias)        # as ours: else it may spike without any input
    x, y = (torch.from_numpy(np.array(a)).to(device) for a in measure.data(case))
    x, y = x / case.drive, y.long()

    def forward(drive: float) -> tuple[Any, Any]:
        state, readout, loss, fired = start(), 0., 0., 0.
        spikes = torch.zeros(case.batch, case.n, device=device)
        for now in x:
            spikes, state = step(layers[0](drive * now) + layers[1](spikes), state)
            readout = DECAY * readout + layers[2](spikes)
            loss = loss + torch.nn.functional.cross_entropy(readout, y) / case.steps
            fired = fired + spikes.detach().mean()
        return loss, fired / case.steps

    def gradient(drive: float) -> None:
        layers.zero_grad()
        forward(drive)[0].backward()
        if device == 'cuda':
            torch.cuda.synchronize()

    def rate(drive: float) -> float:
        with torch.no_grad():
            return float(forward(drive)[1])

    def memory(drive: float) -> int:
        """Bytes of the tensors that the backward pass keeps, each once."""
        kept: dict[int, Any] = {}
        ours = {p.untyped_storage().data_ptr() for p in layers.parameters()}
        ours.add(x.untyped_storage().data_ptr())

        def pack(a: Any) -> Any:
            kept[a.untyped_storage().data_ptr()] = a.untyped_storage()
            return a

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
            forward(drive)
        return sum(s.nbytes() for at, s in kept.items() if at not in ours)
    return Peer(gradient, rate, memory)


def _snntorch(case: Case) -> Peer:
    def neuron(torch: Any) -> Any:
        snn = importlib.import_module('snntorch')
        cell = snn.Leaky(beta=DECAY, spike_grad=snn.surrogate.fast_sigmoid(),
                         reset_mechanism='subtract')
        return cell.init_leaky, cell
    return _torch_peer(case, neuron)


def _norse(case: Case) -> Peer:
    def neuron(torch: Any) -> Any:
        norse = importlib.import_module('norse.torch')
        parameters = norse.LIFBoxParameters(tau_mem_inv=torch.as_tensor(1 / 20e-3))
        cell = norse.LIFBoxCell(p=parameters, dt=1e-3)
        return lambda: None, cell
    return _torch_peer(case, neuron)


def _spikingjelly(case: Case) -> Peer:
    def neuron(torch: Any) -> Any:
        base = 'spikingjelly.activation_based'
        nodes = importlib.import_module(f'{base}.neuron')
        cell = nodes.LIFNode(tau=20., v_reset=None, decay_input=False)
        return cell.reset, lambda current, _: (cell(current), None)
    return _torch_peer(case, neuron)


def _spyx(case: Case) -> Peer:
    nnx, axn, nn = (importlib.import_module(name) for name in ('flax.nnx', 'spyx.axn', 'spyx.nn'))
    rngs = nnx.Rngs(0)
    layers = nnx.List([nnx.Linear(case.n_in, case.n, rngs=rngs),
                       nn.RLIF((case.n,), beta=DECAY, activation=axn.superspike(), rngs=rngs),
                       nnx.Linear(case.n, case.n_out, rngs=rngs),
                       nn.LI((case.n_out,), beta=DECAY, rngs=rngs)])
    scale = case.n ** -0.5                      # recurrent weights as ours: of the order of 1
    layers[1].recurrent_w[...] = scale * layers[1].recurrent_w[...]
    x, y = measure.data(case)
    x = x / case.drive
    graph, weights = nnx.split(layers)

    def forward(weights: Any, x: Any, y: Any, drive: Any) -> Any:
        dense, neuron, out, readout = nnx.merge(graph, weights)

        def step(states: Any, now: Any) -> Any:
            spikes, v = neuron(dense(drive * now), states[0])
            value, r = readout(out(spikes), states[1])
            logp = jax.nn.log_softmax(value)
            return (v, r), (-jnp.take_along_axis(logp, y[:, None], 1).mean(), spikes.mean())

        start = tuple(a.initial_state(case.batch) for a in (neuron, readout))
        _, (losses, fired) = jax.lax.scan(step, start, x)
        return losses.mean(), fired.mean()

    program = jax.jit(jax.grad(lambda *a: forward(*a)[0]))
    rate = jax.jit(lambda *a: forward(*a)[1])
    return Peer(lambda drive: jax.block_until_ready(program(weights, x, y, drive)),
                lambda drive: float(rate(weights, x, y, drive)),
                lambda drive: program.lower(weights, x, y, drive).compile()
                .memory_analysis().temp_size_in_bytes)


#: Library -> (what it is imported as, its net).
PEERS: dict[str, tuple[str, Callable[[Case], Peer]]] = {
    'snntorch': ('snntorch', _snntorch), 'norse': ('norse', _norse),
    'spikingjelly': ('spikingjelly', _spikingjelly), 'spyx': ('spyx', _spyx)}

#: Ours, by the name of the contestant.
_OURS = {'traceops': 'traceops, D-RTRL', 'free': 'traceops, D-RTRL, trace not carried',
         'bptt': 'brainstate, BPTT', 'forward': 'brainstate, simulation alone'}


def missing(name: str) -> str:
    """How to install a library that is not there; empty where it is."""
    if importlib.util.find_spec(PEERS[name][0]) is None:
        return f"not installed: pip install {name}, or 'braintrace-traceops[peers]' for all"
    return ''


def _drive(rate: Callable[[float], float], wanted: float) -> float:
    """The strength of the input at which a net spikes as often as is wanted."""
    low, high = 0., 1.
    while rate(high) < wanted and high < 2 ** 12:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) < wanted else (low, middle)
    return high


def run(case: Case, repeats: int, names: Sequence[str] = tuple(PEERS)) -> list[dict[str, Any]]:
    """One row a library: seconds of a gradient (interleaved with ours), memory, firing rate."""
    x, y = measure.data(case)
    row = measure.run(case, 1, progress=False, programs=False, names=('upstream', 'traceops'))
    if row.error:
        return [{'who': 'traceops', 'error': row.error}]
    wanted = (row.spikes or 0.) / case.steps
    ours = measure.contestants(case, [*_OURS])
    fns: dict[str, Any] = {name: measure.jitted(fn) for name, fn in ours.items()}
    rows: dict[str, dict[str, Any]] = {
        name: {'who': said, 'rate': wanted, 'error': '',
               'memory': measure.compiled(ours[name], x, y)[1].memory_analysis()
               .temp_size_in_bytes} for name, said in _OURS.items()}
    rows['traceops']['memory'] += case.trace_bytes     # which is carried
    for name in names:
        rows[name] = {'who': f'{name}, BPTT', 'error': missing(name)}
        if rows[name]['error']:
            continue
        try:
            peer = PEERS[name][1](case)
            drive = _drive(peer.rate, wanted)
            rows[name].update(rate=peer.rate(drive), memory=peer.memory(drive))
            fns[name] = lambda x, y, peer=peer, drive=drive: peer.gradient(drive)
        except Exception as err:            # another version of it: a row that says so
            rows[name]['error'] = f'{type(err).__name__}: {err}'
    for name, seconds in measure.interleaved(fns, (x, y), repeats, case.name).items():
        rows[name]['seconds'] = float(np.median(seconds))
    return [{'case': case.name, **found} for found in rows.values()]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = ['| net | library, method | ms | memory MiB | spikes a neuron and step |',
             '|---' * 5 + '|']
    for r in rows:
        cells = [r['error'], '', ''] if r['error'] else [
            f'{1e3 * r["seconds"]:.1f}', f'{r["memory"] / 2 ** 20:.1f}', f'{r["rate"]:.3f}']
        lines.append(f'| {r.get("case", "")} | {r["who"]} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'
