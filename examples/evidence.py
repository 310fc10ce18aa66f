# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A spiking network counts cues and remembers which side had more: a loop written by hand.

Seven cues appear one after the other, each on the left or on the right. Then nothing happens for
a while. Then a signal asks which side had more of them, and the network must know by then: at
that moment its input is the same whatever the answer is (the task of Morcos & Harvey 2016, with
which Bellec et al. 2020 showed e-prop).

The network has 100 spiking neurons (brainpy): half are plain LIF neurons, which forget within
20 ms; half adapt, their threshold rises with every spike and takes 200 ms to fall. It is trained
online with ES-D-RTRL, in a training loop as people write it around braintrace: a scan over time
whose body takes the gradient of one step's loss and adds it up. One line is traceops':
``traceops.install()``.

    python examples/evidence.py             # about a minute; figure in out/evidence.png
    python examples/evidence.py --help
"""

import argparse
import pathlib

import brainpy
import brainstate
import braintools
import braintrace
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import saiunit as u
from against_upstream import interleaved, report
from tqdm import tqdm

import traceops

# ---------------------------------------------------------------------------------------------
# The task: 7 cues of 8 ms with pauses of 4 ms, 60 ms of nothing, 16 ms to answer. dt = 1 ms.

CUES, ON, OFF, DELAY, ANSWER = 7, 8, 4, 60, 16
STEPS = CUES * (ON + OFF) + DELAY + ANSWER
LINES = 10                              # input lines of each kind: left, right, 'answer now', noise


def trials(rng, batch):
    """``spikes [T, batch, 40]``, answers (0 left, 1 right) and ``right - left``, ``[batch]``."""
    likely = rng.choice([0.25, 0.75], size=(batch, 1))
    right = rng.random((batch, CUES)) < likely
    rate = np.zeros((STEPS, batch, 4), np.float32)
    for k in range(CUES):
        rate[k * (ON + OFF):k * (ON + OFF) + ON, np.arange(batch), right[:, k].astype(int)] = 0.4
    rate[-ANSWER:, :, 2] = 0.4
    rate[..., 3] = 0.05
    spikes = rng.random((STEPS, batch, 4, LINES)) < rate[..., None]
    difference = 2 * right.sum(1) - CUES
    return (spikes.reshape(STEPS, batch, 4 * LINES).astype(np.float32),
            (difference > 0).astype(np.int32), difference)


# ---------------------------------------------------------------------------------------------
# The network

class Net(brainstate.nn.Module):
    """Input spikes -> recurrent LIF and ALIF neurons -> two leaky rates."""

    def __init__(self, hidden):
        super().__init__()
        adapts = np.arange(hidden) >= hidden // 2               # the others are LIF neurons
        self.feedforward = braintrace.nn.Linear(
            4 * LINES, hidden, w_init=braintools.init.Normal(0. * u.mA, 0.5 * u.mA),
            b_init=braintools.init.ZeroInit(unit=u.mA))
        self.recurrent = braintrace.nn.Linear(
            hidden, hidden, w_init=braintools.init.Normal(0. * u.mA, 0.5 * hidden ** -0.5 * u.mA),
            b_init=None)
        self.neuron = brainpy.state.ALIF(
            hidden, R=20. * u.ohm, tau=20. * u.ms, tau_a=200. * u.ms,
            beta=jnp.where(jnp.asarray(adapts), 0.5, 0.) * u.mV,
            V_th=1. * u.mV, V_reset=0. * u.mV, V_rest=0. * u.mV,
            spk_fun=braintools.surrogate.ReluGrad(), spk_reset='soft')
        self.readout = braintrace.nn.LeakyRateReadout(
            hidden, 2, tau=20. * u.ms, w_init=braintools.init.KaimingNormal())

    def update(self, x):
        current = self.feedforward(x) + self.recurrent(self.neuron.get_spike())
        return self.readout(self.neuron(current))


# ---------------------------------------------------------------------------------------------
# Training. Nothing here knows traceops.

def make_trainer(args):
    """``train_step(inputs, answers) -> (loss, accuracy, spikes, gradients)`` and ``simulate``."""
    brainstate.random.seed(args.seed)
    model = Net(args.hidden)
    weights = model.states(brainstate.ParamState)
    schedule = braintools.optim.CosineAnnealingLR(
        base_lr=args.rate, T_max=args.epochs * args.batches)
    optimizer = braintools.optim.Adam(schedule)
    optimizer.register_trainable_weights(weights)
    judged = jnp.arange(STEPS) >= STEPS - ANSWER        # the loss counts while an answer is asked

    @brainstate.transform.jit
    def train_step(inputs, answers):
        # A fresh state, and a fresh trace, for every trial of the batch.
        learner = braintrace.ES_D_RTRL(model, decay_or_rank=args.decay)

        @brainstate.transform.vmap_new_states(state_tag='new', axis_size=inputs.shape[1])
        def begin():
            brainstate.nn.init_all_states(model)
            learner.compile_graph(inputs[0, 0])

        begin()
        batched = brainstate.nn.Vmap(learner, vmap_states='new')

        def loss_of_a_step(x):
            rates = batched(x)
            loss = braintools.metric.softmax_cross_entropy_with_integer_labels(rates, answers)
            return loss.mean(), (rates, model.neuron.get_spike().mean())

        def step(total, now):
            x, counts = now
            grads, loss, (rates, spikes) = brainstate.transform.grad(
                loss_of_a_step, weights, has_aux=True, return_value=True)(x)
            total = jax.tree.map(lambda a, g: a + counts * g / ANSWER, total, grads)
            return total, (loss, rates, spikes)

        zeros = jax.tree.map(jnp.zeros_like, {k: st.value for k, st in weights.items()})
        grads, (losses, rates, spikes) = brainstate.transform.scan(step, zeros, (inputs, judged))
        optimizer.update(brainstate.nn.clip_grad_norm(grads, 1.))
        schedule.step()
        accuracy = (rates[-1].argmax(-1) == answers).mean()
        return losses[-ANSWER:].mean(), accuracy, spikes.mean(), grads

    @brainstate.transform.jit
    def simulate(inputs):
        @brainstate.transform.vmap_new_states(state_tag='new', axis_size=inputs.shape[1])
        def begin():
            brainstate.nn.init_all_states(model)

        begin()
        batched = brainstate.nn.Vmap(model, vmap_states='new')
        return brainstate.transform.for_loop(
            lambda x: (batched(x), model.neuron.get_spike(), model.neuron.a.value), inputs)

    return train_step, simulate


# ---------------------------------------------------------------------------------------------
# From the command line to the figure

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--batches', type=int, default=40, help='of new trials, per epoch')
    parser.add_argument('--batch', type=int, default=64, help='trials per batch')
    parser.add_argument('--hidden', type=int, default=100, help='spiking neurons')
    parser.add_argument('--rate', type=float, default=5e-3, help='of Adam, falling to zero')
    parser.add_argument('--decay', type=float, default=0.97, help='of the factors of ES-D-RTRL')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('out'))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    brainstate.environ.set(dt=1. * u.ms)
    rng = np.random.default_rng(args.seed)
    batch = trials(rng, args.batch)

    # The same trainer twice, from the same seed. The first is made and compiled before
    # traceops.install(), so it is upstream's. All that a user adds is that line.
    upstream, _ = make_trainer(args)
    theirs = upstream(*batch[:2])[-1]
    traceops.install()
    train_step, simulate = make_trainer(args)
    ours = train_step(*batch[:2])[-1]
    times = interleaved({'upstream': upstream, 'traceops': train_step}, batch[:2])
    report(theirs, ours, times, args.batches, 'epoch')

    history = {'loss': [], 'accuracy': []}
    bar = tqdm(range(args.epochs), desc='training', unit='epoch')
    for _ in bar:
        losses, right, spikes = zip(*(
            map(float, train_step(*trials(rng, args.batch)[:2])[:3]) for _ in range(args.batches)),
            strict=True)
        history['loss'] += losses
        history['accuracy'] += right
        bar.set_postfix(loss=f'{np.mean(losses):.3f}', accuracy=f'{np.mean(right):.3f}',
                        spikes=f'{np.mean(spikes):.3f}')

    # New trials, with more on the left and more on the right by every margin.
    inputs, answers, difference = trials(rng, 1000)
    rates, spikes, adaptation = simulate(inputs)
    chosen = np.asarray(rates[-1]).argmax(-1)
    print(f'learnt:     {100 * (chosen == answers).mean():.1f} % of 1000 new trials are answered '
          f'right (chance: {100 * max(np.bincount(answers)) / len(answers):.1f} %); '
          f'neurons spike at {100 * float(spikes.mean()):.1f} % of the steps')
    print(traceops.explain(train_step, *batch[:2]))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / 'evidence.png'
    shown = int(np.argmax((chosen == answers) & (difference == 1)))
    draw(path, history, times, difference, chosen, {
        'input': inputs[:, shown], 'spikes': np.asarray(spikes[:, shown]),
        'adaptation': np.asarray(adaptation), 'difference': difference,
        'belief': np.asarray(jax.nn.softmax(rates[:, shown], axis=-1))})
    print(f'figure:     {path}')
    return history


# ---------------------------------------------------------------------------------------------
# The figure

BLUE, RED, GREY, PALE = '#1f6f8b', '#c0392b', '#666666', '#c9d3d8'


def draw(path, history, times, difference, chosen, shown):
    """How it was learned and what it decides (left), one trial as the network lives it (right)."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    style = {'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False,
             'axes.titlelocation': 'left', 'axes.titlesize': 11}
    with plt.rc_context(style):
        fig = plt.figure(figsize=(12, 7.6), layout='constrained')
        grid = fig.add_gridspec(1, 2, width_ratios=(1, 1.5), wspace=0.06)
        left = grid[0, 0].subgridspec(3, 1, height_ratios=(1.1, 1.2, 0.5)).subplots()
        learning(left[0], history['accuracy'])
        decisions(left[1], difference, chosen)
        cost(left[2], times)
        right = grid[0, 1].subgridspec(4, 1, height_ratios=(0.9, 1.5, 0.8, 0.8)).subplots(
            sharex=True)
        trial(right, shown)
        fig.savefig(path, dpi=150)
        plt.close(fig)


def learning(ax, accuracy):
    width = max(1, len(accuracy) // 24)
    smooth = np.convolve(accuracy, np.ones(width) / width, 'valid')
    ax.plot(100 * np.asarray(accuracy), color=PALE, lw=0.8)
    ax.plot(np.arange(len(smooth)) + width / 2, 100 * smooth, color=BLUE, lw=2)
    ax.axhline(50, color=GREY, lw=0.8, ls=':')
    ax.annotate('chance', (len(accuracy), 50), xytext=(0, 3), textcoords='offset points',
                ha='right', color=GREY)
    ax.set(xlabel='batches', ylabel='right answers, %',
           title='Learning: each batch is of new trials')


def decisions(ax, difference, chosen):
    levels = np.unique(difference)
    share = np.array([chosen[difference == d].mean() for d in levels])
    count = np.array([(difference == d).sum() for d in levels])
    error = np.sqrt(share * (1 - share) / count)
    ax.axvline(0, color=PALE, lw=1)
    ax.step([levels[0], 0, levels[-1]], [0, 100, 100], where='pre', color=GREY, lw=0.8, ls=':')
    ax.errorbar(levels, 100 * share, 100 * error, color=BLUE, marker='o', lw=2, capsize=0)
    ax.set(xlabel='cues on the right minus cues on the left', ylabel='answers right, %',
           xticks=levels, title='It weighs the evidence (dotted: without a mistake)')


def cost(ax, times):
    names, values = list(times), [1e3 * t for t in times.values()]
    ax.barh(names, values, color=[RED, BLUE], height=0.6)
    for i, v in enumerate(values):
        ax.annotate(f'{v:.0f} ms', (v, i), xytext=(4, 0), textcoords='offset points', va='center')
    ax.invert_yaxis()
    ax.set(xlim=(0, max(values) * 1.25), xlabel='ms',
           title=f'One training step, {values[0] / values[1]:.3g} times as fast')


def trial(axes, shown):
    half = shown['spikes'].shape[1] // 2
    kinds = ('left', 'right', 'answer!', 'noise')
    colors = (RED, BLUE, 'black', PALE)
    for k, color in enumerate(colors):
        steps, lines = np.nonzero(shown['input'][:, k * LINES:(k + 1) * LINES])
        axes[0].scatter(steps, lines + k * LINES, s=7, marker='|', color=color, linewidths=0.9)
    axes[0].set(yticks=[LINES * (k + 0.5) for k in range(4)], yticklabels=kinds,
                ylim=(4 * LINES, -1), title='A trial: cues, nothing, and the question')
    steps, neurons = np.nonzero(shown['spikes'])
    axes[1].scatter(steps, neurons, s=4, marker='|', linewidths=0.8,
                    c=np.where(neurons < half, GREY, BLUE))
    axes[1].set(ylim=(2 * half, -1), yticks=[half / 2, 1.5 * half], yticklabels=['LIF', 'adaptive'],
                title=f'{2 * half} neurons answer with spikes '
                      f'({100 * shown["spikes"].mean():.0f} % at a step)')
    memory(axes[2], shown, half)
    for side, color in enumerate((RED, BLUE)):
        axes[3].plot(shown['belief'][:, side], color=color, lw=2, label=kinds[side])
    axes[3].axvspan(STEPS - ANSWER - 0.5, STEPS - 0.5, color=PALE, alpha=0.35, lw=0)
    axes[3].legend(frameon=False, loc='center left')
    axes[3].set(xlabel='step (ms)', ylabel='probability', ylim=(-0.02, 1.02),
                xlim=(-0.5, STEPS - 0.5),
                title='The readout (shaded: when an answer is asked, and judged while learning)')


def memory(ax, shown, half):
    """Where the answer is kept: adaptation, along the direction in which the sides differ most."""
    a, difference = shown['adaptation'][..., half:], shown['difference']
    late = a[STEPS - ANSWER - 1]
    axis = late[difference > 0].mean(0) - late[difference < 0].mean(0)
    along = (a - a.mean(1, keepdims=True)) @ (axis / np.linalg.norm(axis))
    for d in np.unique(difference):
        strength = abs(d) / np.abs(difference).max()
        ax.plot(along[:, difference == d].mean(1), lw=1.5, alpha=0.35 + 0.65 * strength,
                color=BLUE if d > 0 else RED)
    ax.set(ylabel='difference', yticks=[0],
           title='Raised thresholds keep the count (means of trials, by cues right minus left)')


if __name__ == '__main__':
    main()
