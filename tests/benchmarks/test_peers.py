# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
import copy

import pytest

from traceops.benchmarks import command, peers, report
from traceops.benchmarks.cases import Case

SMALL = Case('small', 'lif', 'D_RTRL', 8, None, steps=6, batch=2, n_in=12, n_out=3)


@pytest.mark.usefixtures('compiled_quickly')
def test_a_library_that_is_not_there_is_a_row_that_says_how_to_install_it(monkeypatch):
    nothing = lambda case: pytest.fail('it is not there')  # noqa: E731
    monkeypatch.setattr(peers, 'PEERS', {'somewhere': ('no_such_library', nothing)})
    monkeypatch.setattr(peers, '_OURS', {'traceops': 'ours', 'forward': 'simulation'})
    rows = peers.run(SMALL, 1, ['somewhere'])
    assert [row['who'] for row in rows] == ['ours', 'simulation', 'somewhere, BPTT']
    assert all(row['seconds'] > 0 and row['rate'] > 0 for row in rows[:2])
    assert 'pip install somewhere' in rows[2]['error']
    assert 'pip install somewhere' in peers.markdown(rows)


@pytest.mark.parametrize('name', peers.PEERS)
def test_each_library(name):
    if peers.missing(name):
        pytest.skip(f'{name} is {peers.missing(name)}')
    peer = peers.PEERS[name][1](SMALL)
    drive = peers._drive(peer.rate, 0.2)
    assert 0.1 < peer.rate(drive) < 0.4 and peer.memory(drive) > 0
    peer.gradient(drive)


def test_the_strength_of_the_input_is_found():
    assert peers._drive(lambda drive: min(drive / 50, 1.), 0.3) == pytest.approx(15., abs=0.1)


def run_of(**seconds):
    times = {who: {'p50': s} for who, s in seconds.items()}
    return {'machine': {'cpu': 'a', 'gpu': '', 'cores': 2},
            'rows': [{'name': 'net', 'seconds': times, 'compile_ratio': 1.}]}


def test_what_got_slower_is_said():
    before = run_of(traceops=2., free=1., forward=1.)
    assert report.slower(before, before) == []
    busy = run_of(traceops=4., free=2., forward=2.)         # the machine, not the program
    assert report.slower(busy, before) == []
    assert report.slower(run_of(traceops=3., forward=1.), before) == [
        'net: traceops / forward 2.00 -> 3.00']
    compiled = copy.deepcopy(before)
    compiled['rows'][0]['compile_ratio'] = 2.
    assert report.slower(compiled, before) == ['net: compile 1.00 -> 2.00']
    elsewhere = run_of(traceops=1., forward=1.)
    elsewhere['machine']['cpu'] = 'b'
    said = report.slower(before, elsewhere)
    assert 'another machine' in said[0] and 'net: traceops' in said[1]


def test_against_is_for_nets(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(['--peers', '--against', str(tmp_path / 'x.json')])
    assert '--against compares nets' in capsys.readouterr().err
    assert command.main(['--peers', '--list']) == 0
    assert capsys.readouterr().out.split('\n')[:2] == [c.name for c in peers.CASES]
