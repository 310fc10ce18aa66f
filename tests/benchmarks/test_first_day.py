# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops verify``: what it would ask of a GPU and in which order, and its report."""

import pathlib

import pytest

from traceops import cli
from traceops.benchmarks import first_day, repeats
from traceops.benchmarks.first_day import STEPS, Step


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Steps that need no GPU, where there is said to be one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first_day, '_device', lambda: 'gpu, H100')
    monkeypatch.setattr(first_day, 'STEPS', (
        Step('good', 'is it good?', ('this',)),
        Step('bad', 'is it bad?', ('no_module_of_that_name',)),
        Step('sources', 'are they here?', ('pytest', 'tests/ops/test_gpu.py')),
        Step('tool', 'is it installed?', ('this',), ('a-tool-that-nobody-has',))))


def test_right_comes_before_quick(capsys):
    assert [step.name for step in STEPS] == [
        'kernels', 'parity', 'bits', 'margins', 'tune', 'bench', 'loops', 'rates', 'tiles',
        'operations', 'racecheck', 'memcheck']
    assert cli.main(['verify', '--list']) == 0
    out = capsys.readouterr().out
    places = [out.index(f' {step.name} ') for step in STEPS]
    assert places == sorted(places)
    for command in ('tests/ops/test_gpu.py', 'tests/parity', 'repeats bits',
                    'bench --no-compile-time', 'compute-sanitizer --error-exitcode 9'):
        assert command in ' '.join(step.line for step in STEPS)


def test_every_step_names_what_there_is():
    """Files of the tests, commands, and options that they know."""
    root = pathlib.Path(__file__).parents[2]
    for step in STEPS:
        module, *options = step.command
        assert all((root / path).exists() for path in options if path.startswith('tests/'))
        if module == 'traceops':
            assert options[0] in cli.COMMANDS
            with pytest.raises(SystemExit, match='0'):
                cli.main([*options, '--help'])
        elif module != 'pytest':
            assert module == repeats.__name__
            with pytest.raises(SystemExit, match='0'):
                repeats.main([*options, '--help'])


@pytest.mark.cpu('there the steps are run')
def test_without_a_gpu_nothing_is_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['verify']) == 1
    error = capsys.readouterr().err
    assert 'verify asks a GPU, and jax runs on cpu' in error and '--list' in error
    assert not [*tmp_path.iterdir()]


def test_one_that_fails_does_not_stop_the_next(steps, capsys):
    assert cli.main(['verify', '--out', 'here']) == 1
    text = pathlib.Path('here/report.md').read_text()
    assert text.startswith('# traceops verify: gpu, H100\n')
    assert '| good | is it good? | ok |' in text and 'Beautiful is better than ugly.' in text
    assert '| bad | is it bad? | FAILED (1) |' in text and 'No module named' in text
    assert '| sources | are they here? | left out |' in text and 'run this in a checkout' in text
    assert 'a-tool-that-nobody-has is not installed' in text
    assert 'Beautiful' in pathlib.Path('here/good.txt').read_text()
    assert 'here/report.md' in capsys.readouterr().out


def test_steps_by_name(steps):
    assert cli.main(['verify', 'good']) == 0
    found = {path.name for path in pathlib.Path('out/verify').iterdir()}
    assert found == {'good.txt', 'report.md'}
    with pytest.raises(SystemExit, match='2'):
        cli.main(['verify', 'nothing'])
