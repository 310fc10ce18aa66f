# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark checks before it times, and says what it missed."""

import dataclasses
import json
import re
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from traceops import benchmarks
from traceops.benchmarks import curves, loops, measure, report, sparse, user_programs
from traceops.benchmarks.cases import CASES, Case

TINY = Case('tiny', 'lif', 'D_RTRL', 16, 1e9, 0., steps=5, batch=4)


def test_every_row_that_is_aimed_at_is_measured():
    aims = {c.name: (c.bar, c.bar_free) for c in CASES}
    assert aims == {
        'D-RTRL LIF 128': (6., 10.), 'D-RTRL LIF 1024': (40., 100.),
        'D-RTRL ALIF 128 vmap': (15., 30.), 'D-RTRL ALIF 1024': (60., 150.),
        'D-RTRL GRU 128': (6., 9.), 'D-RTRL LSTM 64': (4., 5.), 'ES-D-RTRL LIF 128': (1.3, None),
        'ES-D-RTRL two-layer ALIF 128 vmap': (1.3, None), 'ES-D-RTRL GRU 128': (1., None),
        'ES-D-RTRL LIF 2048': (1.9, None), 'D-RTRL LIF 8192': (None, None)}
    big = CASES[-1]
    assert big.steps == 20 and not big.upstream_fits and big.trace_bytes > 8e9


@pytest.mark.usefixtures('compiled_quickly')
def test_a_row_from_end_to_end(monkeypatch):
    monkeypatch.setattr(measure, '_COMPILED', 1)
    row = measure.run(dataclasses.replace(TINY, steps=2), 1, progress=False)
    assert not row.error and row.difference <= 1e-5 and row.spikes > 0.05
    assert set(row.seconds) == {'upstream', 'traceops', 'reset', 'free', 'bptt', 'forward'}
    figures = json.loads(json.dumps(report.figures(row)))
    assert figures['ratio'] == pytest.approx(row.median('upstream') / row.median('traceops'))
    text = report.summary([figures])
    assert 'tiny: ratio ' in text and 'ratio_free' not in text
    assert 'MISSED' in report.markdown([figures]) and 'tiny' in report.table([figures])


def test_a_report_says_of_which_commit_it_is(tmp_path):
    assert report._commit(tmp_path) == ''
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b']
    (tmp_path / 'module.py').write_text('')
    for command in ['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'first']:
        subprocess.run([*git, *command], check=True)
    clean = report._commit(tmp_path)
    assert re.fullmatch(r'\+[0-9a-f]{7,}', clean)
    (tmp_path / 'module.py').write_text('edited = True')
    assert report._commit(tmp_path) == f'{clean}-dirty'
    assert report.machine()['versions']['traceops'].startswith(traceops.__version__)


@pytest.mark.parametrize(('upstream', 'ratio'), [(15.04, '15x'), (206.4, '206x'), (1005., '1005x')])
def test_a_ratio_is_written_out(upstream, ratio):
    row = measure.Row(TINY, seconds={'upstream': [upstream], 'traceops': [1.]})
    assert f'| {ratio} (MISSED' in report.markdown([report.figures(row)])


def test_aims_are_of_the_cpu(monkeypatch):
    """Elsewhere a row is to be no slower than upstream."""
    row = measure.Row(TINY, seconds={'upstream': [1.], 'traceops': [2.], 'free': [.5]})
    assert report.figures(row)['bar'] == TINY.bar
    monkeypatch.setattr(report.jax, 'default_backend', lambda: 'gpu')
    figures = report.figures(row)
    assert (figures['bar'], figures['bar_free']) == (1., 1.)
    assert 'ratio 0.50 < 1' in report.summary([figures])


def test_a_gpu_is_also_asked_without_our_kernels(monkeypatch):
    names = ('xla', 'forward', 'kernel')
    assert set(measure.contestants(TINY, names)) == {'forward'}
    asked = []
    monkeypatch.setattr(
        measure, 'online', lambda train, compiler, **settings: asked.append(settings))
    monkeypatch.setattr(measure.jax, 'default_backend', lambda: 'gpu')
    assert set(measure.contestants(TINY, names)) == {*names}
    assert asked == [{'backend': 'jax', 'carry_trace': False}]
    row = measure.Row(TINY, seconds={
        'upstream': [2.], 'traceops': [1.], 'xla': [1.5], 'kernel': [.3]})
    head = report.markdown([report.figures(row)]).splitlines()[2]
    assert "backend='jax' ms" in head and 'forward, kernel ms' in head and 'BPTT' not in head


def test_a_learner_simulates_as_its_model_does():
    losses = [jitted(measure.of_case(TINY)) for jitted in (
        lambda t: measure.jitted(measure.simulation(t))(t.inputs, t.targets),
        lambda t: measure.jitted(measure.evolution(t))(t.inputs, t.targets))]
    assert losses[0] > 0 and abs(losses[0] - losses[1]) < 1e-5 * losses[0]


def test_a_wrong_gradient_gets_no_speed(monkeypatch):
    def contestants(case, names):
        right = lambda x, y: ({'w': x.sum(0)}, 0.)                      # noqa: E731
        spoiled = lambda x, y: ({'w': 1.001 * x.sum(0)}, 0.)            # noqa: E731
        return {'upstream': right, 'traceops': right, 'free': spoiled}
    monkeypatch.setattr(measure, '_spikes_per_neuron', lambda case, x: 1.)
    monkeypatch.setattr(measure, 'contestants', contestants)
    row = measure.run(TINY, 2, progress=False)
    assert 'gradients differ' in row.error and not row.seconds
    assert 'REFUSED' in report.line(report.figures(row))


def test_zeros_prove_nothing():
    with pytest.raises(ValueError, match='proves nothing'):
        measure.check({'w': jnp.zeros(3)}, {'w': jnp.zeros(3)})
    assert measure.check({'w': jnp.ones(3)}, {'w': jnp.ones(3) * 1.5}) == pytest.approx(0.5)
    good, nan = jnp.ones(3), jnp.full(3, jnp.nan)
    assert not measure.check({'a': good, 'b': good}, {'a': good, 'b': nan}) <= 1.


def test_the_command(capsys):
    assert benchmarks.main(['--list']) == 0
    assert 'D-RTRL LIF 8192' in capsys.readouterr().out
    assert benchmarks.main(['--cases', 'nothing']) == 2
    for unheard in (['--loops', '--plots', 'd'], ['--operations', '--markdown', 'f'],
                    ['--operations', '--loops']):
        with pytest.raises(SystemExit):
            benchmarks.main(unheard)
        assert 'leave out --loops' in capsys.readouterr().err


def test_a_net_that_is_silent_is_refused(monkeypatch):
    monkeypatch.setattr(measure, '_spikes_per_neuron', lambda case, x: 0.)
    row = measure.run(dataclasses.replace(TINY, steps=2), 2, progress=False)
    assert 'does not spike' in row.error and not row.seconds


def test_a_loop_with_a_wrong_gradient_gets_no_speed(monkeypatch):
    """Of two loops that take no time, one is a thousandth off."""
    grads = iter([jnp.ones(3), jnp.ones(3), jnp.ones(3) * 1.001])
    monkeypatch.setattr(loops, 'train_step', lambda one: lambda x, y: (0., next(grads)))
    row = loops.run(loops.LoopCase('tiny', TINY), 2, progress=False)
    assert 'gradients differ' in row['error'] and not row['seconds']
    assert '| tiny | REFUSED: gradients differ' in loops.markdown([row])


@pytest.mark.usefixtures('compiled_quickly')
def test_a_loop_from_end_to_end(capsys):
    case = loops.LoopCase('tiny', dataclasses.replace(TINY, vmap=True), epochs=3)
    row = loops.run(case, 1, progress=False)
    assert not row['error'] and row['difference'] <= 1e-5 and row['ratio'] > 0
    assert row['curves']['epochs'] == 3 and row['curves']['first'] != row['curves']['last']
    assert np.isfinite(row['curves']['nudged'])
    assert benchmarks.main(['--loops', '--list']) == 0
    assert 'clipped at every step' in capsys.readouterr().out


@pytest.mark.slow           # its loop is among those of the programs
@pytest.mark.usefixtures('compiled_quickly')
def test_a_loop_by_hand_from_end_to_end():
    case = loops.LoopCase('tiny', dataclasses.replace(TINY, vmap=True), by_hand=True)
    row = loops.run(case, 2, progress=False)
    assert not row['error'] and row['difference'] <= 1e-5


def _tiny(program):
    case = dataclasses.replace(program.case, n=8, steps=6, batch=2, n_in=10, n_out=2)
    return dataclasses.replace(program, case=case, warm_up=4 if program.warm_up else 0, rounds=1)


@pytest.mark.usefixtures('compiled_quickly')
@pytest.mark.parametrize('place', [0, pytest.param(4, marks=pytest.mark.slow), 5, 9, 10])
def test_a_program_from_end_to_end(place):
    row = user_programs.run(_tiny(user_programs.PROGRAMS[place]), 1)
    assert not row['error'] and row['difference'] <= 1e-5 and row['value'] >= 0
    text = user_programs.markdown([json.loads(json.dumps(row))])
    assert ('met' if user_programs.met(row) else 'MISSED') in text


def test_a_program_with_a_wrong_gradient_gets_no_figure():
    grads = iter([jnp.ones(3), jnp.ones(3) * 1.001])
    program = dataclasses.replace(_tiny(user_programs.PROGRAMS[0]), build=lambda one: lambda x, y: (
        next(grads)))
    row = user_programs.run(program, 1)
    assert 'gradients differ' in row['error'] and row['value'] is None
    assert 'REFUSED: gradients differ' in user_programs.markdown([row])


def test_curves_reach_the_corners_and_fail_on_a_cliff(monkeypatch, capsys):
    sizes = [(p.case.n, p.case.batch, p.case.steps) for p in curves.PROGRAMS]
    assert [(min(axis), max(axis)) for axis in zip(*sizes, strict=True)] == [
        (32, 4096), (1, 256), (8, 3200)]
    asked = []

    def run(one, repeats):
        asked.append(one.rounds)
        return {'name': one.name, 'figure': one.figure, 'bar': one.bar, 'error': '',
                'upstream': 1., 'traceops': 2., 'value': .5, 'difference': 0.}
    monkeypatch.setattr(user_programs, 'run', run)
    assert benchmarks.main(['--curves', '--cases', 'N = 32, B = 1, T = 8']) == 1
    assert asked == [40, 120] and 'upstream / traceops 0.50' in capsys.readouterr().out
    monkeypatch.setattr(curves, 'CLIFF', .4)
    assert benchmarks.main(['--curves', '--cases', 'N = 32, B = 1, T = 8']) == 0
    assert 'no cliff' in capsys.readouterr().out


def test_programs_are_named(capsys):
    assert benchmarks.main(['--programs', '--list']) == 0
    assert 'warm-up' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        benchmarks.main(['--programs', '--loops'])
    assert 'leave out --loops' in capsys.readouterr().err


@pytest.mark.usefixtures('compiled_quickly')
@pytest.mark.parametrize('place', [
    4, *(pytest.param(i, marks=pytest.mark.slow) for i in (0, 5, 6))])
def test_a_sparse_net_from_end_to_end(place, capsys):
    case = dataclasses.replace(sparse.cases((10_000,))[place], n=40, share=0.2, batch=2, steps=8,
                               compiles=1)
    row = sparse.run(case, 1, progress=False)
    assert not row['error'] and 0.01 < row['spikes'] < 0.3
    assert 0 < row['difference'] <= 1e-5        # of the largest net, from windows of other steps
    text = sparse.markdown([json.loads(json.dumps(row))])
    assert 'met' in text or 'MISSED' in text
    assert benchmarks.main(['--sparse', '--list', '--neurons', '500', '127400']) == 0
    assert 'fly of 500 neurons' in (said := capsys.readouterr().out) and 'fly of 127,400' in said


def test_a_sparse_net_with_a_wrong_gradient_gets_no_figure(monkeypatch):
    grads = iter([jnp.ones(3), jnp.ones(3) * 1.001])
    monkeypatch.setattr(sparse, '_rate', lambda train: 0.1)
    monkeypatch.setattr(sparse, 'online', lambda *_, **__: lambda x, y: (next(grads), 0.))
    case = dataclasses.replace(sparse.cases()[1], n=20, share=0.3, batch=2, steps=8)
    row = sparse.run(case, 1, progress=False)
    assert 'gradients differ' in row['error'] and not row['seconds']
    assert 'REFUSED: gradients differ' in sparse.markdown([row])
    monkeypatch.setattr(sparse, '_rate', lambda train: 0.)
    assert 'does not spike' in sparse.run(case, 1, progress=False)['error']
