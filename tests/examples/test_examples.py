# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The worked examples, in small: they run, learn, agree with upstream, and draw."""

import importlib
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse

import traceops

EXAMPLES = pathlib.Path(__file__).parents[2] / 'examples'
NAMES = ('against_upstream', 'copying', 'evidence', 'fly_brain', 'many_devices')

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
    assert '0 B of' in said and 'window' in said


def test_a_connectome_remembers(example, tmp_path, capsys):
    """Spikes occur, and the trained part between the neurons holds the answer."""
    example('fly_brain').main([
        '--neurons', '200', '--delay', '20', '--batch', '16', '--no-upstream',
        '--out', str(tmp_path)])
    said = capsys.readouterr().out
    right, chance, cut, spikes = map(float, re.search(
        r'learnt: +([\d.]+) % .*chance: ([\d.]+) %.* part ([\d.]+) %.* at ([\d.]+) %',
        said).groups())
    assert right > chance + 15 and right > cut, said
    assert 1 < spikes < 50
    assert re.search(r'to come: .* about \d+ s; [\d.]+ MiB', said)
    assert (tmp_path / 'fly_brain.png').stat().st_size > 20_000


def test_a_connectome_that_is_made_obeys_dale(example):
    made = example('fly_brain').make(300, np.random.default_rng(0))
    assert not made.diagonal().any()
    signs = np.sign(made.toarray())
    assert ((signs.max(1) - signs.min(1)) <= 1).all() and {-1, 1} <= set(signs.ravel())
    assert (made.data == np.rint(made.data)).all() and 3 < abs(made.data).mean() < 4
    degrees = np.diff(made.indptr)
    assert degrees.max() > 3 * np.median(degrees)


def test_a_connectome_from_files(example, tmp_path):
    """Ids with more digits than a float keeps; connections that are listed twice add up."""
    fly = example('fly_brain')
    ids = 720575940600000000 + np.array([1, 2, 3])
    edges = [(2, 0, 4.), (0, 1, -3.), (2, 0, 1.)]
    want = np.zeros((3, 3))
    for pre, post, weight in edges:
        want[pre, post] += weight
    lines = [f'{weight},x,{ids[post]},{ids[pre]}' for pre, post, weight in edges]
    (tmp_path / 'edges.csv').write_text('\n'.join(['weight,name,post,pre', *lines]))
    scipy.sparse.save_npz(tmp_path / 'edges.npz', scipy.sparse.coo_array(want))
    for name in ('edges.csv', 'edges.npz'):
        np.testing.assert_array_equal(fly.load(tmp_path / name).toarray(), want)
    (tmp_path / 'less.csv').write_text('pre,post\n1,2')
    with pytest.raises(SystemExit, match='no column weight among pre, post'):
        fly.load(tmp_path / 'less.csv')
    with pytest.raises(SystemExit, match=r'\.csv, \.parquet or \.npz'):
        fly.load(tmp_path / 'edges.txt')


def test_a_connectome_in_parquet(example, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet', reason='Parquet is read by pyarrow')
    import pyarrow
    ids = 720575940600000000 + np.array([1, 2, 3])
    edges = {'weight': [4, -3, 1], 'name': list('abc'), 'post': ids[[0, 1, 0]],
             'pre': ids[[2, 0, 2]]}
    parquet.write_table(pyarrow.table(edges), tmp_path / 'edges.parquet', row_group_size=2)
    load = example('fly_brain').load
    np.testing.assert_array_equal(load(tmp_path / 'edges.parquet').toarray(),
                                  [[0, -3, 0], [0, 0, 0], [5, 0, 0]])
    for wrong, said in (({'post': edges['post']}, 'no column pre, weight among post'),
                        ({**edges, 'pre': [ids[0], None, ids[1]]}, 'empty cells in pre')):
        parquet.write_table(pyarrow.table(wrong), tmp_path / 'wrong.parquet')
        with pytest.raises(SystemExit, match=said):
            load(tmp_path / 'wrong.parquet')


def test_parquet_without_pyarrow_says_what_to_run(example, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(SystemExit, match=f'run {re.escape(sys.executable)} -m pip install pyarrow'):
        example('fly_brain').load(tmp_path / 'edges.parquet')


def _small(example):
    """Of two processes: ``(module, options)``."""
    pytest.importorskip('orbax.checkpoint', reason='checkpoints are written by orbax-checkpoint')
    many = example('many_devices')
    return many, many.parse(['--neurons=24', '--batch=8', '--steps=6', '--window=3',
                             '--training-steps=6'])


def test_two_processes_train_as_one(example, tmp_path, monkeypatch):
    """They join on loopback; each has half of the devices, and half of the samples."""
    many, args = _small(example)
    monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
    losses, ended = many.start(args, tmp_path / 'checkpoints')
    assert ended and sorted(losses) == list(range(args.training_steps))
    traceops.install(window=args.window)
    np.testing.assert_allclose([losses[i] for i in sorted(losses)], many.alone(args), rtol=1e-4)
    assert losses[5] != losses[0]


@pytest.mark.slow           # seven programs in processes of their own
def test_a_process_is_killed_and_both_resume(example):
    many, args = _small(example)
    traceops.install(window=args.window)
    many.two_processes(args)


@pytest.mark.slow           # the same of more nets and rules: parity/test_devices.py
def test_many_devices(tmp_path):
    """The whole example, in a process of its own: it makes its devices when jax starts."""
    done = subprocess.run([sys.executable, str(EXAMPLES / 'many_devices.py')],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r'samples on 8 devices; one reduction of \d+\.\d kB a window', done.stdout)
    assert 'one was killed, both resumed' in done.stdout


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
