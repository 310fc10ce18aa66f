# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark checks before it times, measures what was agreed, and says what it missed."""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from traceops import benchmarks
from traceops.benchmarks import command, contestants, measure, report
from traceops.benchmarks.cases import CASES, SWEEPS, Case

TINY = Case('tiny', 'lif', 'D_RTRL', 16, 1e9, 0., steps=5, batch=4)
WHO = ('upstream', 'traceops', 'free', 'bptt', 'forward')

#: name -> net, rule, n_in, N, n_out, T, B, vmap, bar with the trace carried, without
AGREED = {
    'D-RTRL LIF 128': ('lif', 'D_RTRL', 50, 128, 10, 50, 32, False, 6, 10),
    'D-RTRL LIF 1024': ('lif', 'D_RTRL', 50, 1024, 10, 50, 32, False, 40, 100),
    'D-RTRL ALIF 128 vmap': ('alif', 'D_RTRL', 50, 128, 10, 50, 32, True, 15, 30),
    'D-RTRL ALIF 1024': ('alif', 'D_RTRL', 50, 1024, 10, 50, 32, False, 60, 150),
    'D-RTRL GRU 128': ('gru', 'D_RTRL', 50, 128, 10, 50, 32, False, 6, 9),
    'D-RTRL LSTM 64': ('lstm', 'D_RTRL', 50, 64, 10, 30, 16, False, 4, 5),
    'ES-D-RTRL LIF 128': ('lif', 'ES_D_RTRL', 50, 128, 10, 50, 32, False, 1.3, None),
    'ES-D-RTRL two-layer ALIF 128 vmap':
        ('two-alif', 'ES_D_RTRL', 50, 128, 10, 50, 32, True, 1.3, None),
    'ES-D-RTRL GRU 128': ('gru', 'ES_D_RTRL', 50, 128, 10, 50, 32, False, 1.0, None),
    'ES-D-RTRL LIF 2048': ('lif', 'ES_D_RTRL', 50, 2048, 10, 200, 8, False, 1.9, None),
    'D-RTRL LIF 8192': ('lif', 'D_RTRL', 50, 8192, 10, 20, 32, False, None, None),
}


@pytest.fixture(scope='module')
def tiny():
    """A small row, measured."""
    return measure.run(TINY, 2, progress=False, patience=0.1)


# ------------------------------------------------------------------------------ cases

def test_the_table_is_the_one_that_was_agreed():
    assert {c.name: (c.net, c.rule, c.n_in, c.n, c.n_out, c.steps, c.batch, c.vmap, c.bar,
                     c.bar_free) for c in CASES} == AGREED
    assert all(c.window is None for c in CASES)


def test_everybody_takes_part_where_they_fit():
    for case in CASES[:-1]:
        free = ('free',) if case.rule == 'D_RTRL' else ()
        assert case.contestants == ('upstream', 'traceops', *free, 'bptt', 'forward')
    big = CASES[-1]
    assert big.contestants == ('free', 'bptt', 'forward')
    assert big.memory_bar == 4 * 2 ** 30 and big.check_batch == 1


def test_each_sweep_varies_one_size():
    for field, cases in SWEEPS.items():
        sizes = [getattr(c, field) for c in cases]
        assert len(cases) >= 4 and sizes == sorted(set(sizes))
        assert len({dataclasses.replace(c, name='', **{field: 0}) for c in cases}) == 1


@pytest.mark.parametrize('net', ['lif', 'alif', 'two-alif'])
def test_the_nets_spike(net):
    case = Case(net, net, 'D_RTRL', 32, None, steps=20, batch=4)
    x = np.asarray(contestants.data(case)[0])
    assert x.shape == (20, 4, 50) and set(np.unique(x)) == {0., 20.}
    assert 0.15 < (x > 0).mean() < 0.25
    assert contestants.spikes_per_neuron(case) > measure.FEWEST_SPIKES


# ------------------------------------------------------------------------------ checks

def test_check_is_the_largest_difference_by_norm():
    want = {'a': jnp.array([3., 4.]), 'b': jnp.array([1000.])}
    got = {'a': jnp.array([3., 4.5]), 'b': jnp.array([1001.])}
    assert measure.check(want, got) == pytest.approx(0.1)
    assert measure.check(want, want) == 0.


@pytest.mark.parametrize('want, got, message', [
    ([0., 0.], [0., 0.], 'proves nothing'),
    ([1., 0.], [1., 1e-9], 'not zero as it should be'),
    ([1., 2.], [1., np.nan], 'not finite'),
    ([np.nan, 2.], [np.nan, 2.], 'not finite'),
    ([1., 2.], [1.], 'structure')])
def test_check_refuses_what_cannot_be_compared(want, got, message):
    with pytest.raises(ValueError, match=message):
        measure.check([jnp.array(w) for w in want], [jnp.array(g) for g in got])


def test_what_upstream_leaves_alone_has_to_be_left_alone():
    assert measure.check([jnp.ones(2), jnp.zeros(3)], [jnp.ones(2) * 1.5, jnp.zeros(3)]) == 0.5


def refused(row, message):
    """No speed of it anywhere."""
    assert message in row.error and row.seconds == {}
    figures = report.figures(row)
    assert figures['ratio'] is None and figures['aims'] == []
    assert 'REFUSED' in report.line(figures) and 'refused' in report.summary([figures])
    assert 'REFUSED' in report.tables([figures])
    assert 'refused' in report.markdown([figures], report.machine())


def test_a_wrong_gradient_is_refused(monkeypatch):
    """One leaf of one contestant is off by a ten-thousandth."""
    enter = contestants.enter

    def spoiled(case, who):
        made = enter(case, who)
        if who != 'free':
            return made

        def call(x, y):
            grads, loss = made.call(x, y)
            leaves, tree = jax.tree.flatten(grads)
            return jax.tree.unflatten(tree, [leaves[0] * 1.0001, *leaves[1:]]), loss
        return contestants.Contestant(call, made.learner)
    monkeypatch.setattr(contestants, 'enter', spoiled)
    refused(measure.run(TINY, 2, progress=False), 'gradients of free differ by 1.0e-04')


def test_the_trace_that_a_call_leaves_is_checked_too(monkeypatch):
    """A contestant that is right from a zero trace only."""
    enter = contestants.enter
    monkeypatch.setattr(contestants, 'enter', lambda case, who: enter(
        case, 'free' if who == 'traceops' else who))
    refused(measure.run(TINY, 2, progress=False), 'gradients of traceops differ')


class Made(contestants.Contestant):
    """What a contestant returns, made up."""

    def __init__(self, grads, loss=1., learned=()):
        super().__init__(lambda x, y: (grads, jnp.asarray(loss)))
        self.paths = set(learned)

    @property
    def learned(self):
        return self.paths


GOOD = {('a',): jnp.ones(3), ('b', 'w'): jnp.arange(4.)}


@pytest.mark.parametrize('who, made, message', [
    ('', None, ''),
    ('traceops', Made({**GOOD, ('a',): jnp.ones(3) * 1.001}), 'traceops differ by 1.0e-03'),
    ('traceops', Made({**GOOD, ('a',): jnp.ones(3) * jnp.nan}), 'not finite'),
    ('bptt', Made({**GOOD, ('a',): jnp.ones(3) * jnp.nan}), 'not finite'),
    ('bptt', Made(GOOD, 1.01), 'the loss of bptt is 1.01'),
    ('forward', Made(None, jnp.nan), 'the loss of forward'),
    ('upstream', Made(GOOD, learned=['a', 'b.w']), ''),
    ('upstream', Made({**GOOD, ('b', 'w'): jnp.zeros(4)}, learned=['b.w']), 'b.w is zero'),
], ids=['good', 'wrong', 'nan', 'bptt', 'loss', 'nan loss', 'learned', 'not learned'])
def test_a_row_with_a_failed_check_has_no_speed(monkeypatch, who, made, message):
    given = dict.fromkeys(WHO, Made(GOOD)) | {'forward': Made(None)}
    if who == 'upstream':                               # then everybody agrees with it
        given |= dict.fromkeys(('traceops', 'free'), made)
    if made is not None:
        given[who] = made
    monkeypatch.setattr(contestants, 'enter', lambda case, who: given[who])
    row = measure.run(dataclasses.replace(TINY, net='gru'), 2, progress=False, patience=0.001)
    if message:
        refused(row, message)
    else:
        assert row.error == '' and set(row.seconds) == set(WHO)


def test_a_silent_net_has_no_speed(monkeypatch):
    monkeypatch.setattr(contestants, 'data', lambda case: (
        jnp.zeros((case.steps, case.batch, case.n_in)), jnp.zeros(case.batch, int)))
    row = measure.run(TINY, 2, progress=False)
    assert 'does not spike' in row.error and row.seconds == {}


# ------------------------------------------------------------------------------ a row

def test_a_row_from_end_to_end(tiny):
    assert tiny.error == '' and tiny.difference <= 1e-5 and tiny.spikes > 0.05
    for measured in (tiny.seconds, tiny.compile_seconds, tiny.memory):
        assert tuple(measured) == WHO and all(np.all(np.asarray(v) > 0) for v in measured.values())
    assert tiny.engines == {'upstream': 'upstream', 'traceops': 'window', 'free': 'window'}
    assert tiny.memory['upstream'] > 2 * 4 * 4 * (50 + 16) * 16        # the trace, in and out


def test_factorised_rules_have_no_row_without_carry():
    row = measure.run(Case('es', 'gru', 'ES_D_RTRL', 8, None, steps=3, batch=2), 1,
                      progress=False, patience=0.01)
    assert row.error == '' and tuple(row.seconds) == ('upstream', 'traceops', 'bptt', 'forward')


def test_a_case_that_upstream_cannot_run_is_checked_with_a_smaller_batch(monkeypatch):
    case = dataclasses.replace(TINY, upstream_fits=False, check_batch=2, memory_bar=1)
    row = measure.run(case, 1, progress=False, patience=0.01)
    assert row.error == '' and row.difference <= 1e-5
    assert tuple(row.seconds) == ('free', 'bptt', 'forward')
    assert row.upstream_bytes > 2 * 4 * 4 * (50 + 16) * 16
    figures = report.figures(row)
    assert figures['aims'][-1]['what'] == 'peak GiB' and not figures['aims'][-1]['met']
    assert 'was not run' in report.tables([figures])
    figures['upstream_bytes'] = 10 ** 15
    assert 'does not fit' in report.markdown([figures], report.machine())


def test_calls_are_interleaved_and_short_ones_repeated(monkeypatch):
    order = []
    calls = {who: lambda who=who: order.append(who) for who in ('slow', 'fast')}
    times = measure._interleaved(calls, (), {'slow': 2., 'fast': 0.049}, 5, 3., None)
    assert len(times['slow']) == 5 and len(times['fast']) >= 30
    at = [i for i, who in enumerate(order) if who == 'slow']
    assert all(4 <= b - a <= 26 for a, b in zip([-1, *at], [*at, len(order)], strict=True)), at


# ------------------------------------------------------------------------------ report

def row_of(ratios, **changes):
    """A row whose medians are these multiples of forward's 1 ms."""
    case = dataclasses.replace(TINY, name='made up', bar=6., bar_free=10., **changes)
    seconds = {who: [k * 1e-3 * f for f in (0.5, 1, 1, 1, 9)] for who, k in ratios.items()}
    return measure.Row(case, 1e-7, 2., seconds=seconds,
                       compile_seconds={'upstream': 2., 'traceops': 2.5, 'free': 4.})


def test_the_figures_are_ratios_of_medians():
    f = report.figures(row_of({'upstream': 40, 'traceops': 8, 'free': 2, 'bptt': 4, 'forward': 1}))
    assert f['seconds']['free']['p50'] == pytest.approx(2e-3) and f['seconds']['free']['calls'] == 5
    assert (f['ratio'], f['ratio_free']) == pytest.approx((5, 20))
    assert f['learning'] == pytest.approx({'traceops': 8, 'free': 2})
    assert f['over_bptt'] == pytest.approx({'traceops': 2, 'free': 0.5})
    assert f['compile_ratio'] == pytest.approx({'traceops': 1.25, 'free': 2})
    assert {a['what']: a['met'] for a in f['aims']} == {
        'upstream / traceops': False, 'upstream / no carry': True, 'learning / forward': True,
        'learning / BPTT': True, 'compile': False}
    text = report.summary([f])
    assert '3 of 5 aims met' in text and 'upstream / traceops 5, aimed at >= 6' in text
    assert 'compile 2, aimed at <= 1.5' in text and 'slower than BPTT (2.00' in text


def test_losing_is_said():
    f = report.figures(row_of({'upstream': 4, 'traceops': 8, 'bptt': 3, 'forward': 1},
                              rule='ES_D_RTRL'))
    text = report.summary([f])
    assert "takes 2.00 of upstream's time" in text
    assert 'learning / forward 8, aimed at <= 2.5' in text
    assert 'learning / BPTT 2.67, aimed at <= 1' in text
    assert 'slower than BPTT' in report.markdown([f], report.machine())
    assert 'MISSED 2.5' in report.tables([f])


def test_a_busy_machine_is_said():
    assert report.busy({'load': 3., 'cores': 2}) and not report.busy({'load': 0.1, 'cores': 2})


# ------------------------------------------------------------------------------ command

SCHEMA = {'name': str, 'case': dict, 'error': str, 'difference': float, 'engines': dict,
          'spikes_per_neuron': float, 'seconds': dict, 'compile_seconds': dict, 'memory': dict,
          'peak_rss': int, 'upstream_bytes': type(None), 'ratio': float, 'ratio_free': float,
          'learning': dict, 'over_bptt': dict, 'compile_ratio': dict, 'aims': list}


@pytest.fixture
def ready(monkeypatch, tiny):
    """The command with a table of one row, measured already."""
    monkeypatch.setattr(command, 'CASES', (TINY, dataclasses.replace(TINY, name='slow',
                                                                     heavy=True)))
    monkeypatch.setattr(command, 'SWEEPS', {
        field: tuple(dataclasses.replace(TINY, name=f'{field}={v}', **{field: v})
                     for v in (8, 16)) for field in ('n', 'steps')})
    monkeypatch.setattr(command, 'run',
                        lambda case, *args, **kwargs: dataclasses.replace(tiny, case=case))


def test_json_has_everything(ready, tmp_path, capsys):
    assert benchmarks.main(['--cases', 'tiny', '--json', str(tmp_path / 'a.json')]) == 0
    out = capsys.readouterr().out
    assert 'braintrace 0.2' in out and 'cores' in out and 'aims met' in out
    data = json.loads((tmp_path / 'a.json').read_text())
    assert set(data) == {'format', 'machine', 'rows', 'sweeps'} and data['sweeps'] == {}
    assert {'cpu', 'cores', 'memory', 'load', 'python', 'versions'} == set(data['machine'])
    row, = data['rows']
    assert {k: type(v) for k, v in row.items()} == SCHEMA
    assert Case(**row['case']) == TINY
    for who in WHO:
        p = row['seconds'][who]
        assert set(p) == {'p20', 'p50', 'p80', 'calls'} and p['p20'] <= p['p50'] <= p['p80']


def test_markdown_and_plots(ready, tmp_path, capsys):
    argv = ['--quick', '--markdown', str(tmp_path / 'a.md'), '--plots', str(tmp_path / 'plots')]
    assert benchmarks.main(argv) == 0
    table = [text for text in (tmp_path / 'a.md').read_text().splitlines() if '|' in text]
    assert len(table) == 3 and len({text.count('|') for text in table}) == 1
    assert 'tiny (N=16, T=5, B=4)' in table[-1]
    files = sorted((tmp_path / 'plots').iterdir())
    assert [f.name for f in files] == ['memory-t.png', 'rows.png', 'time-n.png', 'time-t.png']
    assert all(f.read_bytes()[:4] == b'\x89PNG' and f.stat().st_size > 5000 for f in files)


def test_the_sweep_alone(ready, tmp_path):
    assert benchmarks.main(['--sweep', '--json', str(tmp_path / 'a.json')]) == 0
    data = json.loads((tmp_path / 'a.json').read_text())
    assert data['rows'] == []
    assert [f['name'] for f in data['sweeps']['steps']] == ['steps=8', 'steps=16']


def test_cases_are_listed_and_chosen(ready, capsys):
    assert benchmarks.main(['--list']) == 0
    assert [text.split()[0] for text in capsys.readouterr().out.splitlines()] == ['tiny', 'slow']
    assert benchmarks.main(['--list', '--quick']) == 0
    assert 'slow' not in capsys.readouterr().out
    assert benchmarks.main(['--cases', 'nothing']) == 2
    assert 'known: tiny, slow' in capsys.readouterr().err


@pytest.mark.parametrize('argv, message', [
    (['--repeats', '0'], 'not a positive number'), (['--json', '/nowhere/a.json'], 'no folder')])
def test_wrong_arguments_are_refused_before_any_work(argv, message, capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(argv)
    assert message in capsys.readouterr().err


def test_several_rows_run_in_processes_of_their_own(ready, monkeypatch, tmp_path, capsys, tiny):
    """One of them dies: its row says so, the others stay, the status is 1."""
    started = []

    def start(argv, **kwargs):
        name = argv[argv.index('--cases') + 1]
        started.append(name)
        if name == 'tiny':
            path = argv[argv.index('--json') + 1]
            with open(path, 'w') as f:
                json.dump({'rows': [report.figures(tiny)]}, f)
        return subprocess.CompletedProcess(argv, 0 if name == 'tiny' else -9)
    monkeypatch.setattr(subprocess, 'run', start)
    assert benchmarks.main([]) == 1
    out = capsys.readouterr().out
    assert started == ['tiny', 'slow']
    assert 'slow: REFUSED, its process ended with status -9' in out and 'gradients differ' in out
