# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A GRU repeats symbols that it saw hundreds of steps ago, learnt online in constant memory.

Three symbols are shown, one a step. Then 300 steps of nothing. Then a signal, and the network must
say the three in order (the copying task of Hochreiter & Schmidhuber 1997, as in Arjovsky et al.
2016). Backpropagation through time keeps every step until the end. D-RTRL needs no past: it rolls
a trace forward, the influence of each weight on each hidden state, for every sequence of the
batch. That is memory that does not grow with the delay, but a lot of it, read and written at
every step.

traceops forms the same gradient a window of steps at a time. What it stores is

* what enters and leaves each layer at the steps of one window (``--window``), and
* the hidden state at the start of each window,

and no trace at all, because here each sequence starts from a trace of zero
(``carry_trace=False``). With ``--carry-trace`` the trace is kept, at one pass a window: it
goes on from call to call, so that a sequence may be cut into calls, or never end.

    python examples/copying.py              # about a minute; figure in out/copying.png
    python examples/copying.py --delay 1000
"""

import argparse
import itertools
import pathlib

import brainstate
import braintools
import braintrace
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.ticker
import numpy as np
from against_upstream import interleaved, report
from tqdm import tqdm

import traceops

# ---------------------------------------------------------------------------------------------
# The task


def sequences(rng, args, delay=None, batch=None):
    """``inputs [T, batch, symbols + 1]``, the signal last, and ``targets [T, batch]``."""
    delay, batch = delay or args.delay, batch or args.batch
    shown = rng.integers(args.symbols, size=(args.length, batch))
    inputs = np.zeros((2 * args.length + delay, batch, args.symbols + 1), np.float32)
    inputs[:args.length, :, :-1] = np.eye(args.symbols)[shown]
    inputs[-args.length:, :, -1] = 1
    targets = np.zeros(inputs.shape[:2], np.int32)
    targets[-args.length:] = shown
    return inputs, targets


def guessing(args):
    """Right answers of who knows nothing, and of who knows the symbols but not their order."""
    kinds = itertools.product(range(args.symbols), repeat=args.length)
    most = [max(map(s.count, s)) / args.length for s in kinds]
    return 1 / args.symbols, float(np.mean(most))


# ---------------------------------------------------------------------------------------------
# The network

class Net(brainstate.nn.Module):
    """A GRU and a linear readout.

    A GRU forgets within a few steps unless its update gate is nearly shut, so the gates start
    with time constants from one step to twice the delay (Tallec & Ollivier 2018). Inputs start
    strong: a symbol that arrives must open gates that are shut, and gates that differ in what
    opens them are what tells first from second.
    """

    def __init__(self, args):
        super().__init__()
        rng = np.random.default_rng(args.seed)
        lines, hidden = args.symbols + 1, args.hidden
        self.gru = braintrace.nn.GRUCell(lines, hidden)
        self.readout = braintrace.nn.Linear(hidden, args.symbols)
        for layer in (self.gru.Wz, self.gru.Wr, self.gru.Wh):
            values = dict(layer.weight.value)
            values['weight'] = values['weight'].at[:lines].set(5 * rng.normal(size=(lines, hidden)))
            layer.weight.value = values
        shut = np.sort(rng.uniform(0, np.log(2 * args.delay), hidden))
        self.gru.Wz.weight.value = {**self.gru.Wz.weight.value,
                                    'bias': -jnp.asarray(shut, jnp.float32)}

    def update(self, x):
        return self.readout(self.gru(x))


# ---------------------------------------------------------------------------------------------
# Training. Nothing here knows traceops.

def make_trainer(args):
    """``(learner, train_step, simulate)``; ``train_step`` gives loss, accuracy and gradients."""
    brainstate.random.seed(args.seed)
    model = Net(args)
    learner = braintrace.compile(
        model, 'D_RTRL', np.zeros((args.batch, args.symbols + 1), np.float32),
        batch_size=args.batch)
    schedule = braintools.optim.CosineAnnealingLR(
        base_lr=args.rate, T_max=args.epochs * args.batches)
    optimizer = braintools.optim.Adam(schedule)
    optimizer.register_trainable_weights(learner.param_states)

    def loss_of_a_step(x, y):
        logits = learner(x)
        loss = braintools.metric.softmax_cross_entropy_with_integer_labels(logits, y)
        return loss.mean(), (logits.argmax(-1) == y).mean()

    @brainstate.transform.jit
    def train_step(inputs, targets):
        brainstate.nn.reset_all_states(learner, batch_size=args.batch)
        asked = jnp.arange(len(inputs)) >= len(inputs) - args.length
        grads, loss, right = learner.etrace_grad(
            inputs, targets, step_fn=loss_of_a_step, mask=asked, has_aux=True, return_value=True,
            loss_output='scalar')
        optimizer.update(brainstate.nn.clip_grad_norm(grads, 1.))
        schedule.step()
        return loss, right[-args.length:].mean(), grads

    @brainstate.transform.jit
    def simulate(inputs):
        brainstate.nn.reset_all_states(model, batch_size=inputs.shape[1])
        return brainstate.transform.for_loop(lambda x: (model(x), model.gru.h.value), inputs)

    return learner, train_step, simulate


# ---------------------------------------------------------------------------------------------
# From the command line to the figure

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--delay', type=int, default=300, help='steps of nothing')
    parser.add_argument('--length', type=int, default=3, help='symbols to repeat')
    parser.add_argument('--symbols', type=int, default=4, help='how many there are')
    parser.add_argument('--hidden', type=int, default=128)
    parser.add_argument('--epochs', type=int, default=16)
    parser.add_argument('--batches', type=int, default=50, help='of new sequences, per epoch')
    parser.add_argument('--batch', type=int, default=32, help='sequences per batch')
    parser.add_argument('--rate', type=float, default=5e-3, help='of Adam, falling to zero')
    parser.add_argument('--window', type=int, default=51,
                        help='steps of which factors are kept (306 = 6 * 51)')
    parser.add_argument('--carry-trace', action='store_true', help='keep the trace between calls')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('out'))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    steps = 2 * args.length + args.delay
    rng = np.random.default_rng(args.seed)
    batch = sequences(rng, args)

    # The same trainer twice, from the same seed; the first is made before traceops.install(), so
    # it is upstream's. All that a user adds is that line; the settings are optional.
    _, upstream, _ = make_trainer(args)
    theirs = upstream(*batch)[-1]
    traceops.install(window=min(args.window, steps), carry_trace=args.carry_trace)
    learner, train_step, simulate = make_trainer(args)
    ours = train_step(*batch)[-1]
    times = interleaved({'upstream': upstream, 'traceops': train_step}, batch, rounds=3)
    report(theirs, ours, times, 1, 'batch')
    for delay in (args.delay, args.delay + 3 * steps):          # one sequence, and four times that
        program = train_step.compile(*sequences(rng, args, delay)).memory_analysis()
        print(f'memory:     {program.temp_size_in_bytes / 2 ** 20:.3g} MiB beside weights and '
              f'inputs for a delay of {delay} steps')

    history = {'loss': [], 'accuracy': []}
    bar = tqdm(range(args.epochs), desc='training', unit='epoch')
    for _ in bar:
        losses, right = zip(*(
            map(float, train_step(*sequences(rng, args))[:2]) for _ in range(args.batches)),
            strict=True)
        history['loss'] += losses
        history['accuracy'] += right
        bar.set_postfix(loss=f'{np.mean(losses):.3f}', accuracy=f'{np.mean(right):.3f}')

    chance, bag = guessing(args)
    delays = [max(1, round(args.delay * f)) for f in (0.5, 0.75, 1, 1.25, 1.5, 2)]
    found = {delay: accuracy(simulate, *sequences(rng, args, delay, 500), args.length)
             for delay in delays}
    print(f'learnt:     {100 * found[args.delay]:.1f} % of the symbols of 500 new sequences are '
          f'repeated right, {args.delay} steps later (chance: {100 * chance:.0f} %; knowing them '
          f'without their order: {100 * bag:.0f} %)')
    print('            trained on that delay alone; others: '
          + ', '.join(f'{d} steps {100 * a:.0f} %' for d, a in found.items() if d != args.delay))
    print(traceops.explain(learner))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / 'copying.png'
    inputs, _ = sequences(rng, args, batch=1)
    logits, hidden = simulate(inputs)
    draw(path, args, history, times, found, {
        'input': inputs[:, 0], 'hidden': np.asarray(hidden[:, 0]),
        'belief': np.asarray(jax.nn.softmax(logits[:, 0], axis=-1))})
    print(f'figure:     {path}')
    return history


def accuracy(simulate, inputs, targets, length):
    logits, _ = simulate(inputs)
    return float((np.asarray(logits[-length:]).argmax(-1) == targets[-length:]).mean())


# ---------------------------------------------------------------------------------------------
# The figure

BLUE, RED, GREY, PALE = '#1f6f8b', '#c0392b', '#666666', '#c9d3d8'


def draw(path, args, history, times, found, shown):
    """How it was learned and how it lasts (left), one sequence as the network lives it (right)."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    style = {'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False,
             'axes.titlelocation': 'left', 'axes.titlesize': 11}
    with plt.rc_context(style):
        fig = plt.figure(figsize=(12, 7.6), layout='constrained')
        grid = fig.add_gridspec(1, 2, width_ratios=(1, 1.5), wspace=0.06)
        left = grid[0, 0].subgridspec(3, 1, height_ratios=(1.3, 1, 0.5)).subplots()
        learning(left[0], history['accuracy'], guessing(args))
        lasting(left[1], found, args)
        cost(left[2], times)
        sequence(grid[0, 1], args, shown)
        fig.savefig(path, dpi=150)
        plt.close(fig)


def learning(ax, right, levels):
    width = max(1, len(right) // 24)
    smooth = np.convolve(right, np.ones(width) / width, 'valid')
    ax.plot(100 * np.asarray(right), color=PALE, lw=0.8)
    ax.plot(np.arange(len(smooth)) + width / 2, 100 * smooth, color=BLUE, lw=2)
    for level, name in zip(levels, ('chance', 'the symbols, not their order'), strict=True):
        ax.axhline(100 * level, color=GREY, lw=0.8, ls=':')
        ax.annotate(name, (len(right), 100 * level), xytext=(0, 3), textcoords='offset points',
                    ha='right', color=GREY)
    ax.set(xlabel='batches', ylabel='symbols repeated right, %', ylim=(0, 103),
           title='First it learns what it saw, then in which order')


def lasting(ax, found, args):
    ax.plot(list(found), [100 * a for a in found.values()], color=BLUE, marker='o', lw=2)
    ax.plot(args.delay, 100 * found[args.delay], 'o', color=RED, zorder=3)
    ax.annotate('trained on', (args.delay, 100 * found[args.delay]), xytext=(0, -16),
                textcoords='offset points', ha='center', color=RED)
    ax.axhline(100 * guessing(args)[0], color=GREY, lw=0.8, ls=':')
    ax.set(xlabel='delay, steps', ylabel='right, %', ylim=(0, 107), title='Other delays')


def cost(ax, times):
    names, values = list(times), [1e3 * t for t in times.values()]
    ax.barh(names, values, color=[RED, BLUE], height=0.6)
    for i, v in enumerate(values):
        ax.annotate(f'{v:.0f} ms', (v, i), xytext=(4, 0), textcoords='offset points', va='center')
    ax.invert_yaxis()
    ax.set(xlim=(0, max(values) * 1.25), xlabel='ms',
           title=f'One batch, {values[0] / values[1]:.3g} times as fast')


def sequence(place, args, shown):
    """The beginning and the end are drawn wide, the long wait between them as it is."""
    steps, edge = len(shown['input']), args.length + 4
    parts = list(itertools.pairwise(at - 0.5 for at in (0, edge, steps - edge, steps)))
    axes = place.subgridspec(3, 3, height_ratios=(0.6, 2.2, 0.6), wspace=0.03,
                             width_ratios=(1, 2, 1)).subplots(sharey='row', sharex='col')
    rows = (('input', 'Greys', 0, 'input line', 'It is shown symbols, nothing, and the signal'),
            ('hidden', 'RdBu', -1, 'unit, at the start fast to slow',
             'What it keeps in its hidden state'),
            ('belief', 'Blues', 0, 'symbol', 'It says (circles: right answers)'))
    for across, (name, colours, low, label, title) in zip(axes, rows, strict=True):
        for ax, part in zip(across, parts, strict=True):
            ax.imshow(shown[name].T, aspect='auto', cmap=colours, vmin=low, vmax=1,
                      interpolation='nearest')
            ax.set_xlim(part)
            ax.tick_params(left=ax is across[0])
            ax.spines['left'].set_visible(ax is across[0])
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        across[0].set_ylabel(label)
        across[0].set_title(title).set_in_layout(False)          # it is wider than its part
    axes[-1][-1].plot(range(steps - args.length, steps), shown['input'][:args.length].argmax(-1),
                      'o', mfc='none', mec=RED, ms=9)
    for ax, name in zip(axes[-1], ('shown', 'nothing', 'asked'), strict=True):
        ax.set_xlabel(f'step ({name})')


if __name__ == '__main__':
    main()
