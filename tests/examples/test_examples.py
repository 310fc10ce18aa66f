# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The worked examples, in small: they run, learn, agree with upstream, and draw."""

import importlib
import pathlib
import re
import sys

import numpy as np
import pytest

import traceops

EXAMPLES = pathlib.Path(__file__).parents[2] / 'examples'
NAMES = ('against_upstream', 'copying', 'evidence')

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.exists(), reason='the examples are in the sources'),
    pytest.mark.usefixtures('compiled_quickly')]


@pytest.fixture
def example(monkeypatch):
    """Imports one as ``python examples/NAME.py`` would find it, and forgets it again."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def run(example, tmp_path, capsys):
    """Runs one in small; what it printed, if it learned, agreed with upstream, and drew."""
    def in_small(name, *options):
        losses = np.array(example(name).main([*options, '--out', str(tmp_path)])['loss'])
        said = capsys.readouterr().out
        assert traceops.installed()
        assert losses[-10:].mean() < 0.9 * losses[:10].mean(), losses
        assert float(re.search(r'difference of a leaf from upstream (\S+)', said)[1]) <= 1e-5
        assert re.search(r'upstream [\d.]+ s, traceops [\d.]+ s: [\d.]+ times as fast', said)
        assert re.search(r'learnt: +[\d.]+ % of .*\(chance', said)
        assert (tmp_path / f'{name}.png').stat().st_size > 20_000
        return said
    return in_small


def test_a_spiking_network_in_a_loop_written_by_hand(run):
    """It spikes, and its gradients wait until after the loop."""
    said = run('evidence', '--epochs', '2', '--batches', '30', '--batch', '32', '--hidden', '40',
               '--rate', '0.01')
    assert 'the loop only adds' in said and '- formed after the steps' in said
    assert 1 < float(re.search(r'spike at ([\d.]+) %', said)[1]) < 50


@pytest.mark.slow           # what it shows is tried on smaller nets: parity/test_memory.py
def test_a_gru_in_memory_that_does_not_grow(run):
    said = run('copying', '--epochs', '2', '--batches', '20', '--batch', '16', '--hidden', '32',
               '--delay', '56', '--length', '2', '--window', '20', '--rate', '0.02')
    short, long = map(float, re.findall(r'memory: +([\d.]+) MiB', said))
    assert 0 < short and long <= 1.25 * short, said
    assert '0.00 MiB of' in said and 'window' in said


def test_answers_follow_from_the_cues(example):
    evidence = example('evidence')
    spikes, answers, difference = evidence.trials(np.random.default_rng(0), 200)
    assert spikes.shape == (evidence.STEPS, 200, 4 * evidence.LINES)
    cues = spikes.reshape(evidence.STEPS, 200, 4, -1).sum((0, 3))
    more = cues[:, 1] > cues[:, 0]
    clear = abs(difference) > 1                 # one cue more may have fewer spikes
    assert (more == answers)[clear].mean() > 0.99 and 0.3 < answers.mean() < 0.7
    quiet = spikes[-evidence.DELAY - evidence.ANSWER:-evidence.ANSWER]
    assert not quiet[..., :3 * evidence.LINES].any()


def test_symbols_come_first_and_are_asked_for_last(example):
    copying = example('copying')
    args = copying.parse(['--delay', '5', '--length', '2', '--symbols', '3', '--batch', '7'])
    inputs, targets = copying.sequences(np.random.default_rng(0), args)
    assert inputs.shape == (9, 7, 4) and not inputs[2:-2].any()
    np.testing.assert_array_equal(inputs[:2, :, :-1].argmax(-1), targets[-2:])
    assert copying.guessing(args) == (1 / 3, (3 + 6 / 2) / 9)


def test_a_gradient_that_differs_is_no_speed(example, capsys):
    against = example('against_upstream')
    a, times = {'w': np.ones(3), 'v': np.zeros(2)}, {'upstream': 2., 'traceops': 1.}
    against.report(a, a, times, 1, 'batch')
    assert '2 times as fast' in capsys.readouterr().out
    for wrong in ({**a, 'w': np.ones(3) * 1.01}, {**a, 'v': np.full(2, 1e-3)},
                  {**a, 'w': np.full(3, np.nan)}):
        with pytest.raises(SystemExit, match='differ'):
            against.report(a, wrong, times, 1, 'batch')
    with pytest.raises(SystemExit, match='prove nothing'):
        against.difference({'w': np.zeros(3)}, {'w': np.zeros(3)})
