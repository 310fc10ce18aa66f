# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops programs``: what it says of figures, and of what it cannot do here."""

import dataclasses
import importlib.util
import json
import types

import brainstate
import jax.numpy as jnp
import pytest

from traceops import cli
from traceops.benchmarks import hlo, programs, programs_command
from traceops.benchmarks.cases import PROGRAMS


def program(launches, nbytes, microseconds, loops=0, seconds=None):
    kernel = hlo.Kernel('loop_add', 'fusion', launches, nbytes // launches, 0,
                        microseconds / launches, 'model', 'jit(f)/[add]')
    total = hlo.Totals(launches, nbytes, microseconds, loops)
    return programs.Program((kernel,), total, 4096, seconds)


@pytest.fixture
def found():
    return {'upstream': program(220, 66000, 90.), 'traceops': program(150, 3000, 21., seconds=3.),
            'loop': program(200, 4000, 30., seconds=2.), 'alone': program(3, 500, 5.),
            'reset': program(145, 2900, 15.), 'free': program(140, 2800, 10., loops=2),
            'forward': program(100, 2000, 10.)}


def run(*argv):
    try:
        return cli.main(['programs', *argv])
    except SystemExit as done:
        return done.code


def test_the_rows_and_what_is_aimed_at():
    aims = {row.case.name: row.aims for row in PROGRAMS}
    spiking = dict(launches_alone=2, compile=1)
    gated = dict(launches_free=40, compile=1)
    assert aims == {
        'ES-D-RTRL LIF 2048': dict(kernels=1.5, time=1.6, bytes=2., launches=50, **spiking),
        'ES-D-RTRL LIF 128': dict(kernels=1.5, time=2., bytes=1., launches=45, **spiking),
        'D-RTRL LIF 1024': dict(kernels=1.6, time=2., bytes=20., launches=50, launches_free=40,
                                **spiking),
        'D-RTRL ALIF 1024': dict(kernels=1.8, time=2.5, bytes=60., launches=55, launches_free=45,
                                 **spiking),
        'D-RTRL GRU 128': dict(launches_alone=5, **gated), 'D-RTRL LSTM 64': gated,
        'ES-D-RTRL two-layer ALIF 128 vmap': dict(launches=60, **spiking),
        'ES-D-RTRL LIF 128, loop by hand': dict(launches=50, **spiking),
        'D-RTRL LIF 1024, loop by hand': dict(launches=50, **spiking)}
    assert {(row.case.steps, row.case.batch) for row in PROGRAMS} == {(50, 32)}


def test_ratios_and_verdicts(found):
    row = programs_command.figures('a net', 'h100', found, dict(kernels=1.5, time=2., bytes=20.))
    assert json.loads(json.dumps(row)) == row
    ours = row['programs']['traceops']
    assert ours['over_simulation'] == {'kernels': 1.5, 'time': 2.1, 'moved': 1.5}
    assert ours['bytes_of_upstream'] == 22.
    text = programs_command.table([row])
    assert '1.5 (met 1.5)' in text and '2.1 (MISSED 2)' in text and '22 (met 20)' in text
    assert 'traceops, reset' in text and '1.45' in text
    assert '140 and 2 loops' in text            # whose length is not known: said, not guessed
    assert programs_command.summary([row]).startswith('missed:\n  a net: time 2.1, aimed at 2\n')
    assert '2.1 (MISSED 2)' in programs_command.markdown([row])
    met = programs_command.figures('a net', 'h100', found, dict(kernels=1.5, time=2.2, bytes=1.))
    assert programs_command.summary([met]).startswith('every aim met\n')
    launched = programs_command.figures('a net', 'h100', found, dict(
        launches=150, launches_free=130))
    text = programs_command.markdown([launched])
    assert '150 (met 150)' in text and '140 and 2 loops (MISSED 130)' in text
    assert programs_command.summary([launched]).startswith(
        'missed:\n  a net, no carry: launches 140, aimed at 130\n')
    more = programs_command.figures('a net', 'h100', found, dict(launches_alone=2, compile=1.5))
    text = programs_command.markdown([more])
    assert '3 (MISSED 2)' in text and '1.5 (met 1.5)' in text
    assert programs_command.summary([more]).startswith(
        'missed:\n  a net, what simulates: launches 3, aimed at 2\n')
    none = programs_command.figures('a net', 'h100', found, {})
    assert 'met' not in programs_command.summary([none])
    assert 'met' not in programs_command.table([none])


def test_kernels_largest_first(found):
    small = dataclasses.replace(found['traceops'].kernels[0], name='tiny', microseconds=1e-3)
    both = dataclasses.replace(found['traceops'], kernels=(small, *found['traceops'].kernels))
    text = programs_command.kernel_table('traceops', both)
    assert text.index('loop_add') < text.index('tiny') and 'jit(f)/[add]' in text


def test_the_command(found, monkeypatch, capsys, tmp_path):
    asked = []

    def compiled(make, gpu, free):
        asked.append((make().algorithm, gpu, free))
        return found
    monkeypatch.setattr(programs_command, 'programs', compiled)
    assert run('ES-D-RTRL LIF 128', 'D-RTRL LIF 128', '--gpu', 'b200', '--ops',
               '--json', str(tmp_path / 'p.json'), '--markdown', str(tmp_path / 'p.md')) == 0
    assert asked == [('ES_D_RTRL', 'b200', False), ('D_RTRL', 'b200', True)]
    out = capsys.readouterr().out
    assert 'compiled for b200' in out and 'simulation only: kernels' in out
    rows = json.loads((tmp_path / 'p.json').read_text())
    assert [row['name'] for row in rows] == ['ES-D-RTRL LIF 128', 'D-RTRL LIF 128']
    assert rows[0]['programs']['upstream']['kernels'][0]['times'] == 220
    assert 'D-RTRL LIF 128' in (tmp_path / 'p.md').read_text()
    assert run('--list') == 0 and 'D-RTRL ALIF 1024' in capsys.readouterr().out


def test_a_loop_by_hand_has_a_step_of_its_own(found, monkeypatch):
    asked = []
    monkeypatch.setattr(programs_command, 'loop_programs',
                        lambda case, gpu: asked.append((case.rule, gpu)) or found)
    assert run('*by hand') == 0
    assert asked == [('ES_D_RTRL', 'h100'), ('D_RTRL', 'h100')]


def test_a_net_of_the_users(found, monkeypatch, tmp_path, capsys):
    (tmp_path / 'their_net.py').write_text(
        'def training():\n    return dict(model=1, algorithm="D_RTRL", inputs=[2], batch_size=3,\n'
        '                loss=lambda out: out + 1)\n'
        'def half():\n    return dict(model=1)\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []
    monkeypatch.setattr(programs_command, 'programs',
                        lambda make, gpu, free: made.append(make()) or found)
    assert run('their_net:training') == 0
    assert made[0].options == {'batch_size': 3} and made[0].loss(1, None) == 2
    assert run('their_net:half') == 1
    assert 'half() returned no algorithm, inputs, loss' in capsys.readouterr().err


def test_names_that_are_not_known_say_what_is(capsys):
    assert run('nothing*') == 2
    assert "no case matches 'nothing*'; there are" in capsys.readouterr().err
    assert run('--gpu', 'v100') == 2
    assert 'h100' in capsys.readouterr().err


@pytest.mark.parametrize('plugin, platforms, why', [
    (False, None, 'is not installed'), (True, 'cpu', 'is switched off by JAX_PLATFORMS=cpu')])
def test_without_the_compiler_it_says_where_there_is_one(plugin, platforms, why, monkeypatch,
                                                         capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: plugin or None)
    monkeypatch.setattr(programs, 'jax', types.SimpleNamespace(
        config=types.SimpleNamespace(jax_platforms=platforms)))
    assert run('ES-D-RTRL LIF 128') == 1
    error = capsys.readouterr().err
    assert why in error and 'make gpu-programs' in error


def test_a_function_of_states_as_a_pure_one():
    read, written = brainstate.ShortTermState(jnp.ones(3)), brainstate.ShortTermState(jnp.zeros(3))

    def fn(x):
        written.value = written.value + x * read.value
        return written.value.sum()
    function, states = programs.pure(fn, jnp.ones(3))
    result, new = function(states, 2 * jnp.ones(3))
    assert result == 6 and len(states) == 2
    assert len(new) == 1 and new[0].tolist() == [2., 2., 2.]        # what is only read stays out
    assert written.value.tolist() == [0., 0., 0.]
