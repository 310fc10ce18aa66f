# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo, from the command line to the figure.

The defaults were chosen with ``--select``, which looks at the validation digits alone; the test
digits are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any

import brainstate
import braintrace
import jax
import numpy as np
import saiunit as u
from tqdm import tqdm

import traceops
from traceops.demo import data
from traceops.demo.figure import draw
from traceops.demo.model import SpikingNet, make_trainer

__all__ = ['main']

#: Learning rates that ``--select`` tries.
RATES = (3e-3, 1e-2, 3e-2)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='traceops demo', description='A spiking network learns handwritten digits online.')
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--hidden', type=int, default=128, help='spiking neurons (default 128)')
    parser.add_argument('--batch', type=int, default=50)
    parser.add_argument('--rate', type=float, default=1e-2, help='of Adam, falling to zero')
    parser.add_argument('--rule', choices=('d_rtrl', 'es_d_rtrl'), default='d_rtrl')
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('out'))
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--select', action='store_true',
                        help='compare learning rates on the validation digits, and no more')
    parser.add_argument('--no-upstream', action='store_true', help='skip the comparison')
    parser.add_argument('--quick', action='store_true', help='a few batches, to see that it runs')
    return parser.parse_args(argv)


class Run:
    """A learner, its training step, and the first gradients it saw."""

    def __init__(self, compiler: Callable[..., Any], args: argparse.Namespace,
                 digits: data.Digits, rate: float) -> None:
        brainstate.random.seed(args.seed)
        options = {'decay_or_rank': 0.95} if args.rule == 'es_d_rtrl' else {}
        self.args, self.digits = args, digits
        self.per_epoch = len(digits.train.labels) // args.batch
        self.model = SpikingNet(data.LINES, args.hidden, 10)
        self.learner = compiler(self.model, args.rule,
                                np.zeros((args.batch, data.LINES), np.float32),
                                batch_size=args.batch, **options)
        self.train, self.simulate = make_trainer(
            self.learner, self.model, args.batch, rate, args.epochs * self.per_epoch)
        self.gradients: Any = None

    def epoch(self, number: int, label: str) -> tuple[list[float], list[float]]:
        """Losses and seconds of each batch of an epoch."""
        size, losses, seconds = self.args.batch, [], []
        part = self.digits.train
        order = np.random.RandomState(self.args.seed + number).permutation(len(part.labels))
        count = 4 if self.args.quick else self.per_epoch
        for i in tqdm(range(count), desc=label, leave=False, unit='batch'):
            pick = order[i * size:(i + 1) * size]
            start = time.perf_counter()
            loss, grads = jax.block_until_ready(self.train(
                part.spikes[:, pick], part.labels[pick]))
            seconds.append(time.perf_counter() - start)
            losses.append(float(loss))
            if self.gradients is None:
                self.gradients = grads
        return losses, seconds

    def accuracy(self, part: data.Part) -> float:
        """Share of digits whose rate is the largest at the end (whole batches)."""
        size, right = self.args.batch, []
        for i in range(0, len(part.labels) - size + 1, size):
            rates, _ = self.simulate(part.spikes[:, i:i + size])
            right.append(np.asarray(rates[-1]).argmax(-1) == part.labels[i:i + size])
        return float(np.mean(right))

    def train_on(self, first: int, history: dict[str, list[float]]) -> None:
        """The epochs from ``first`` on; loss and validation accuracy of each."""
        epochs = 2 if self.args.quick else self.args.epochs
        bar = tqdm(range(first, epochs), desc='training', unit='epoch')
        for number in bar:
            losses, _ = self.epoch(number, f'epoch {number + 1}')
            history['loss'].append(float(np.mean(losses)))
            history['accuracy'].append(self.accuracy(self.digits.validation))
            bar.set_postfix(loss=f'{history["loss"][-1]:.3f}',
                            accuracy=f'{history["accuracy"][-1]:.3f}')

    def shown(self) -> dict[str, Any]:
        """What happens while the first test digit is shown."""
        part = self.digits.test
        rates, spikes = self.simulate(part.spikes[:, :self.args.batch])
        return {'image': part.images[0], 'label': int(part.labels[0]),
                'input': part.spikes[:, 0] > 0, 'spikes': np.asarray(spikes)[:, 0] > 0,
                'belief': np.asarray(jax.nn.softmax(rates[:, 0], axis=-1))}


def _largest_difference(a: Any, b: Any) -> float:
    found = []
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        norm = float(np.linalg.norm(p))
        if not norm:
            raise SystemExit('a gradient is zero: the comparison would prove nothing')
        found.append(float(np.linalg.norm(np.asarray(p) - np.asarray(q))) / norm)
    return float(np.max(found))         # NaN where one is


def _steady(seconds: list[float]) -> float:
    """An epoch without its first two steps, which compile, scaled to the whole."""
    return sum(seconds[2:]) * len(seconds) / max(len(seconds) - 2, 1)


def _compare(args: argparse.Namespace, ours: Run) -> tuple[dict[str, float], list[float]]:
    """One epoch on both: the gradients first, then the time."""
    upstream = Run(braintrace.compile, args, ours.digits, args.rate)
    losses, seconds = upstream.epoch(0, 'one epoch, upstream')
    our_losses, our_seconds = ours.epoch(0, 'one epoch, traceops')
    difference = _largest_difference(upstream.gradients, ours.gradients)
    if not difference <= 1e-5:
        raise SystemExit(f'the gradients differ by {difference:.1e}: no speed is worth that')
    a, b = _steady(seconds), _steady(our_seconds)
    print(f'gradients:  largest relative difference of a leaf {difference:.1e} (first batch); '
          f'mean loss of the epoch {np.mean(losses):.4f} and {np.mean(our_losses):.4f} '
          '(a rounding decides a spike at the threshold, and every update after it)')
    print(f'one epoch:  upstream {a:.2f} s, traceops {b:.2f} s: {a / b:.0f} times faster '
          f'(with compiling: {sum(seconds):.1f} s and {sum(our_seconds):.1f} s)')
    return {'upstream': a, 'traceops': b}, our_losses


def _select(args: argparse.Namespace, digits: data.Digits) -> int:
    """Validation accuracy of each learning rate (mean of the last three epochs)."""
    for rate in RATES:
        history: dict[str, list[float]] = {'loss': [], 'accuracy': []}
        Run(traceops.compile, args, digits, rate).train_on(0, history)
        print(f'rate {rate:g}: {np.mean(history["accuracy"][-3:]) * 100:.1f} % of the '
              f'validation digits, loss {history["loss"][-1]:.3f}')
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when the accuracy aimed at (93 %) was not reached in a full run."""
    args = _parse(argv)
    start = time.perf_counter()
    brainstate.environ.set(dt=1. * u.ms)
    digits = data.load()
    if args.select:
        return _select(args, digits)
    print(f'{len(digits.train.labels)} digits to learn, {len(digits.validation.labels)} to '
          f'validate, {len(digits.test.labels)} to test; {args.hidden} adaptive spiking neurons, '
          f'{data.STEPS} steps a digit, rule {args.rule}')
    ours = Run(traceops.compile, args, digits, args.rate)
    if args.no_upstream:
        losses, seconds = ours.epoch(0, 'one epoch')
        times = {'traceops': _steady(seconds)}
    else:
        times, losses = _compare(args, ours)
    history = {'loss': [float(np.mean(losses))], 'accuracy': [ours.accuracy(digits.validation)]}
    ours.train_on(1, history)
    tested = ours.accuracy(digits.test)
    print(f'accuracy:   {tested * 100:.1f} % of the test digits after {len(history["loss"])} '
          f'epochs ({history["accuracy"][-1] * 100:.1f} % of the validation digits)')
    print(traceops.explain(ours.learner))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / 'demo.png'
    draw(path, history, tested, ours.shown(), times)
    print(f'figure:     {path}')
    print(f'in all:     {time.perf_counter() - start:.0f} s')
    return 0 if args.quick or tested >= 0.93 else 1
