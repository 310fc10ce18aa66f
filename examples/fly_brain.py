# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A fly's brain learns to remember: a frozen connectome, and a trained low-rank part beside it.

A cue of 20 ms names one of four classes. Then comes nothing but background, and then a signal asks
which class it was. Nothing outlasts the delay but what neurons tell each other: membranes forget
within 20 ms, the readout within 5. The synapses of the connectome stay as they are; what is
learned, online with ES-D-RTRL, is a part of rank 20 beside them (LoRA) and the readout.

Without a file it makes a connectome. With one it takes yours: an edge list with the columns
``pre, post, weight`` (any ids; a weight is a count of synapses, negative where the presynaptic
neuron inhibits), as CSV or Parquet, or a ``scipy.sparse`` matrix, rows presynaptic, as npz.

    python examples/fly_brain.py                            # figure in out/fly_brain.png
    python examples/fly_brain.py --neurons 500
    python examples/fly_brain.py --connectome edges.csv --batch 8
"""

import argparse
import pathlib
import sys

import brainevent
import brainpy
import brainstate
import braintools
import braintrace
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import saiunit as u
import scipy.sparse
from against_upstream import interleaved, report
from tqdm import tqdm

import traceops

# ---------------------------------------------------------------------------------------------
# The connectome. The adult fly's is FlyWire's (Dorkenwald et al., Nature 2024): 139,255 neurons
# and about 50 million synapses. Shiu et al. (Nature 2024) simulate it with leaky
# integrate-and-fire neurons that are all alike; a connection is as strong as it has synapses, and
# the transmitter of the presynaptic neuron gives its sign. These are their constants.

THRESHOLD, MEMBRANE, SYNAPSE = 7., 20., 5.      # mV above rest; ms; ms
PER_SYNAPSE = 0.275                             # mV, that a spike adds to the synaptic variable
TONIC = 0.8 * THRESHOLD                         # mV, where membranes rest here: near the threshold

# Made ones: as many connections a neuron, and synapses a connection, as a brain of 127,400 neurons
# with 14.7 million connections has. How wide both are spread, and the share of neurons that
# excite, are chosen here.
CONNECTIONS, SYNAPSES, SPREAD, EXCITE = 115, 3.5, 0.8, 0.6


def make(neurons, rng):
    """Signed counts of synapses ``[pre, post]``: log-normal degrees, one sign a neuron (Dale)."""
    mean = min(CONNECTIONS, neurons / 10)
    out, popular = rng.lognormal(sigma=SPREAD, size=(2, neurons))
    degree = rng.poisson(mean * out / out.mean()).clip(1, neurons // 2)
    pre = np.repeat(np.arange(neurons), degree)
    post = rng.choice(neurons, size=len(pre), p=popular / popular.sum())
    count = np.ceil(rng.lognormal(np.log(SYNAPSES - 0.5) - SPREAD ** 2 / 2, SPREAD, len(pre)))
    sign = np.where(rng.random(neurons) < EXCITE, 1, -1)
    edges = np.unique(np.stack([pre, post]), axis=1, return_index=True)[1]
    edges = edges[pre[edges] != post[edges]]
    return scipy.sparse.csr_array((sign[pre[edges]] * count[edges], (pre[edges], post[edges])),
                                  shape=(neurons, neurons))


def load(path):
    """The same of a file."""
    if path.suffix == '.npz':
        matrix = scipy.sparse.csr_array(scipy.sparse.load_npz(path))
        if matrix.shape[0] != matrix.shape[1]:
            raise SystemExit(f'{path}: a square matrix is needed, this one is {matrix.shape}')
        return matrix
    columns = 'pre', 'post', 'weight'
    if path.suffix == '.parquet':
        try:
            from pyarrow import parquet
        except ImportError:
            raise SystemExit(f'{path}: Parquet is read by pyarrow, which is not installed; run '
                             f'{sys.executable} -m pip install pyarrow. '
                             'CSV and npz need nothing more.') from None
        names = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[c for c in columns if c in names])
        if empty := [c for c in table.column_names if table[c].null_count]:
            # numpy would make floats of them, which do not keep the ids
            raise SystemExit(f'{path}: empty cells in {", ".join(empty)}')
        edges = {c: np.asarray(table[c]) for c in table.column_names}
    elif path.suffix == '.csv':
        with path.open() as file:
            names = [name.strip().strip('"') for name in file.readline().split(',')]
        found = [c for c in columns if c in names]
        # ids have up to 18 digits: more than a float keeps
        edges = np.loadtxt(path, delimiter=',', skiprows=1, ndmin=1,
                           usecols=[names.index(c) for c in found],
                           dtype=[(c, float if c == 'weight' else np.int64) for c in found])
    else:
        raise SystemExit(f'{path}: a connectome is read from .csv, .parquet or .npz')
    if missing := [c for c in columns if c not in names]:
        raise SystemExit(f'{path}: no column {", ".join(missing)} among {", ".join(names)}')
    ids, index = np.unique(np.concatenate([edges['pre'], edges['post']]), return_inverse=True)
    return scipy.sparse.csr_array(
        (np.asarray(edges['weight'], float), tuple(index.reshape(2, -1))), shape=2 * (len(ids),))


# ---------------------------------------------------------------------------------------------
# The task: 20 ms of cue, a delay, 20 ms to answer. dt = 1 ms.

CLASSES, LINES, CUE, ANSWER, SEEN = 4, 10, 20, 20, 5
KINDS = CLASSES + 2                             # of input lines: classes, 'answer now', background


def trials(rng, args, batch=None):
    """``spikes [T, batch, lines]`` and classes ``[batch]``."""
    batch = batch or args.batch
    classes = rng.integers(CLASSES, size=batch)
    rate = np.zeros((CUE + args.delay + ANSWER, batch, KINDS, 1))
    rate[:CUE, np.arange(batch), classes] = 0.4
    rate[-ANSWER:, :, CLASSES] = 0.2
    rate[:, :, CLASSES + 1] = 0.1
    spikes = rng.random((*rate.shape[:3], LINES)) < rate
    return spikes.reshape(len(rate), batch, -1).astype(np.float32), classes.astype(np.int32)


# ---------------------------------------------------------------------------------------------
# The network

class Net(brainstate.nn.Module):
    """Input lines -> LIF neurons, connectome and low-rank part between them -> leaky rates."""

    def __init__(self, connectome, args):
        super().__init__()
        n, rng = connectome.shape[0], np.random.default_rng(args.seed)
        # a synapse lets its charge in at once, in one step
        strength = PER_SYNAPSE * SYNAPSE / MEMBRANE
        self.connectome = brainevent.CSR(
            (jnp.asarray(strength * connectome.data, jnp.float32),
             jnp.asarray(connectome.indices, jnp.int32),
             jnp.asarray(connectome.indptr, jnp.int32)), shape=connectome.shape)
        # brainevent keeps arrays that it makes at the first product: not while jax traces
        brainevent.BinaryArray(jnp.zeros(n)) @ self.connectome
        lines = KINDS * LINES
        self.senses = jnp.asarray(              # each line leads to a fiftieth of the neurons
            THRESHOLD / 3 * (rng.random((lines, n)) < 0.02), jnp.float32)
        self.low_rank = braintrace.nn.LoRA(
            n, args.rank, n, kernel_init=braintools.init.Normal(0., (args.rank / n) ** 0.5))
        self.neuron = brainpy.state.LIF(
            n, R=MEMBRANE * u.ohm, tau=MEMBRANE * u.ms, V_th=THRESHOLD * u.mV, V_reset=0. * u.mV,
            V_rest=0. * u.mV, spk_fun=braintools.surrogate.ReluGrad(), spk_reset='soft')
        self.readout = braintrace.nn.LeakyRateReadout(n, CLASSES, tau=5. * u.ms)

    def update(self, x):
        spikes = self.neuron.get_spike()
        # ES-D-RTRL's trace follows the neurons' own past. With the derivative through the frozen
        # synapses in it, gradients were not finite at 2000 neurons, upstream's neither.
        told = (brainevent.BinaryArray(jax.lax.stop_gradient(spikes)) @ self.connectome
                + THRESHOLD * self.low_rank(spikes))
        return self.readout(self.neuron((TONIC / MEMBRANE + x @ self.senses + told) * u.mA))


# ---------------------------------------------------------------------------------------------
# Training. Nothing here knows traceops.

def make_trainer(connectome, args):
    """``(model, train_step, simulate)``; ``train_step`` gives loss, accuracy and gradients."""
    brainstate.random.seed(args.seed)
    model = Net(connectome, args)
    learner = braintrace.compile(
        model, 'ES_D_RTRL', jnp.zeros((args.batch, KINDS * LINES)), batch_size=args.batch,
        decay_or_rank=args.decay)
    schedule = braintools.optim.CosineAnnealingLR(
        base_lr=args.rate / connectome.shape[0] ** 0.5, T_max=args.epochs * args.batches)
    optimizer = braintools.optim.Adam(schedule)
    optimizer.register_trainable_weights(learner.param_states)

    @brainstate.transform.jit
    def train_step(inputs, classes):
        brainstate.nn.reset_all_states(learner, batch_size=args.batch)

        def loss_of_a_step(x):
            rates = learner(x)
            loss = braintools.metric.softmax_cross_entropy_with_integer_labels(rates, classes)
            return loss.mean(), (rates.argmax(-1) == classes).mean()

        # Judged from soon after the cue begins: to know it at the end is to know it all the time.
        grads, loss, right = learner.etrace_grad(
            inputs, step_fn=loss_of_a_step, mask=jnp.arange(len(inputs)) >= SEEN, has_aux=True,
            return_value=True, loss_output='scalar')
        optimizer.update(brainstate.nn.clip_grad_norm(grads, 1.))
        schedule.step()
        return loss, right[-1], grads

    @brainstate.transform.jit
    def simulate(inputs):
        brainstate.nn.reset_all_states(model, batch_size=inputs.shape[1])
        return brainstate.transform.for_loop(
            lambda x: (model(x), model.neuron.get_spike()), inputs)

    return model, train_step, simulate


# ---------------------------------------------------------------------------------------------
# From the command line to the figure

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--neurons', type=int, default=2000, help='of a connectome that is made')
    parser.add_argument('--connectome', type=pathlib.Path, help='.csv, .parquet or .npz')
    parser.add_argument('--rank', type=int, default=20, help='of what is trained')
    parser.add_argument('--delay', type=int, default=40, help='ms between the cue and the question')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--batches', type=int, default=10, help='of new trials, per epoch')
    parser.add_argument('--batch', type=int, default=32, help='trials per batch')
    parser.add_argument('--rate', type=float, default=0.28,
                        help='of Adam times the root of the neurons, falling to zero')
    parser.add_argument('--decay', type=float, default=0.9, help='of the factors of ES-D-RTRL')
    parser.add_argument('--no-upstream', action='store_true', help='do not compare with it')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('out'))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    brainstate.environ.set(dt=1. * u.ms)
    rng = np.random.default_rng(args.seed)
    connectome = load(args.connectome) if args.connectome else make(args.neurons, rng)
    print(f'connectome: {connectome.shape[0]} neurons, {connectome.nnz} connections of '
          f'{abs(connectome.data).mean():.1f} synapses, '
          f'{100 * (connectome.data < 0).mean():.0f} % of them inhibit')
    batch = trials(rng, args)

    # The same trainer twice, from the same seed; the first is made before traceops.install(), so
    # it is upstream's. All that a user adds is that line.
    steps = {}
    if not args.no_upstream:
        _, steps['upstream'], _ = make_trainer(connectome, args)
        theirs = steps['upstream'](*batch)[-1]
    traceops.install()
    model, steps['traceops'], simulate = make_trainer(connectome, args)
    ours = steps['traceops'](*batch)[-1]
    times = interleaved(steps, batch, rounds=3)
    if not args.no_upstream:
        report(theirs, ours, times, 1, 'batch')
    train_step, total = steps['traceops'], args.epochs * args.batches
    memory = train_step.compile(*batch).memory_analysis()
    print(f'to come:    {total} batches of {args.batch} trials of {len(batch[0])} ms, about '
          f'{total * times["traceops"]:.0f} s; {8 * connectome.nnz / 2 ** 20:.3g} MiB of synapses, '
          f'{memory.argument_size_in_bytes / 2 ** 20:.3g} MiB of what is trained and inputs, '
          f'{memory.temp_size_in_bytes / 2 ** 20:.3g} MiB while a batch runs')

    history = {'loss': [], 'accuracy': []}
    with tqdm(total=total, desc='training', unit='batch') as bar:
        for _ in range(total):
            loss, right = map(float, train_step(*trials(rng, args))[:2])
            history['loss'].append(loss)
            history['accuracy'].append(right)
            bar.update()
            bar.set_postfix(loss=f'{loss:.3f}', accuracy=f'{right:.3f}')

    # New trials, also without what was learned between the neurons.
    inputs, classes = trials(rng, args, 256)
    rates, spikes = (np.asarray(a) for a in simulate(inputs))
    model.low_rank.weight.value = jax.tree.map(jnp.zeros_like, model.low_rank.weight.value)
    cut = np.asarray(simulate(inputs)[0][-1]).argmax(-1)
    right = rates.argmax(-1) == classes
    print(f'learnt:     {100 * right[-1].mean():.1f} % of {len(classes)} new trials are answered '
          f'right, {args.delay} ms after the cue (chance: '
          f'{100 * max(np.bincount(classes)) / len(classes):.1f} %); without the low-rank part '
          f'{100 * (cut == classes).mean():.1f} %; neurons spike at {100 * spikes.mean():.1f} % '
          'of the steps')
    print(traceops.explain(train_step, *batch))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / 'fly_brain.png'
    draw(path, history['accuracy'], times, right, inputs, spikes, classes)
    print(f'figure:     {path}')
    return history


# ---------------------------------------------------------------------------------------------
# The figure

COLORS = '#1f6f8b', '#c0392b', '#c98a1b', '#5b8c3e', 'black', '#c9d3d8'     # of kinds of lines
GREY, SHOWN = '#666666', 240                    # neurons, of all, in the raster


def draw(path, accuracy, times, right, inputs, spikes, classes):
    """How it was learned and what it costs (left), one trial as the brain lives it (right)."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    style = {'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False,
             'axes.titlelocation': 'left', 'axes.titlesize': 11}
    with plt.rc_context(style):
        fig = plt.figure(figsize=(12, 6.8), layout='constrained')
        grid = fig.add_gridspec(1, 2, width_ratios=(1, 1.5), wspace=0.06)
        left = grid[0, 0].subgridspec(3, 1, height_ratios=(1.2, 1.2, 0.5)).subplots()
        curve(left[0], accuracy, 'batches', 'Learning: each batch is of new trials')
        curve(left[1], right.mean(1), 'step (ms)', 'New trials: it still knows (shaded: asked)')
        cost(left[2], times)
        axes = grid[0, 1].subgridspec(2, 1, height_ratios=(1, 2.6)).subplots(sharex=True)
        trial(axes, int(np.argmax(right[-1])), inputs, spikes, classes)
        for ax in (left[1], *axes):
            ax.axvspan(len(inputs) - ANSWER - 0.5, len(inputs) - 0.5, color=COLORS[-1], alpha=0.35,
                       lw=0)
        fig.savefig(path, dpi=150)
        plt.close(fig)


def curve(ax, accuracy, of, title):
    width = max(1, len(accuracy) // 30)
    smooth = np.convolve(accuracy, np.ones(width) / width, 'valid')
    ax.plot(np.arange(len(smooth)) + (width - 1) / 2, 100 * smooth, color=COLORS[0], lw=2)
    ax.axhline(100 / CLASSES, color=GREY, lw=0.8, ls=':')
    ax.set(xlabel=of, ylabel='right answers, %', ylim=(0, 103), title=title)


def cost(ax, times):
    names, values = list(times), [1e3 * t for t in times.values()]
    ax.barh(names, values, color=[COLORS[0] if n == 'traceops' else COLORS[1] for n in names],
            height=0.6)
    for i, v in enumerate(values):
        ax.annotate(f'{v:.0f} ms', (v, i), xytext=(4, 0), textcoords='offset points', va='center')
    ax.invert_yaxis()
    faster = f', {values[0] / values[-1]:.3g} times as fast' if len(values) > 1 else ''
    ax.set(xlim=(0, max(values) * 1.25), xlabel='ms', title=f'One training step{faster}')


def trial(axes, which, inputs, spikes, classes):
    """Its input, and the neurons that each class drives most, against the others, in the delay."""
    steps, lines = np.nonzero(inputs[:, which])
    axes[0].scatter(steps, lines, s=7, marker='|', linewidths=0.9,
                    c=[COLORS[k] for k in lines // LINES])
    names = [*(f'class {k + 1}' for k in range(CLASSES)), 'answer!', 'background']
    axes[0].set(yticks=LINES * (np.arange(KINDS) + 0.5), yticklabels=names,
                ylim=(KINDS * LINES, -1), title=f'A trial of class {classes[which] + 1}')
    waiting = spikes[CUE:-ANSWER].mean(0)
    liked = np.stack([waiting[classes == k].mean(0) for k in range(CLASSES)])
    each = min(SHOWN, spikes.shape[-1]) // CLASSES
    shown = np.concatenate([np.argsort(np.delete(liked, k, axis=0).max(0) - liked[k])[:each]
                            for k in range(CLASSES)])
    steps, rows = np.nonzero(spikes[:, which][:, shown])
    axes[1].scatter(steps, rows, s=5, marker='|', linewidths=0.9,
                    c=[COLORS[k] for k in rows // each])
    axes[1].set(xlabel='step (ms)', ylabel='neurons', ylim=(len(shown), -1),
                xlim=(-0.5, len(inputs) - 0.5),
                title=f'The {len(shown)} of {spikes.shape[-1]} neurons that tell classes apart '
                      'in the delay, by class')


if __name__ == '__main__':
    main()
