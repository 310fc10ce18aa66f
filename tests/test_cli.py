# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
import textwrap
import types

import pytest

import traceops
from traceops import cli
from traceops.errors import TraceopsError


@pytest.fixture
def my_net(tmp_path, monkeypatch):
    """A folder with a module of the user's."""
    (tmp_path / 'my_net.py').write_text(textwrap.dedent('''
        import brainstate
        import braintrace
        import jax.numpy as jnp

        class Net(brainstate.nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn = braintrace.nn.ValinaRNNCell(3, 4)

            def update(self, x):
                return self.rnn(x)

        def learner():
            return braintrace.compile(Net(), 'D_RTRL', jnp.zeros((2, 3)), batch_size=2)

        def uncompiled():
            return braintrace.D_RTRL(Net())

        def nothing():
            return 3

        def broken():
            raise KeyError('mine')

        number = 3
    '''))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    yield
    sys.modules.pop('my_net', None)


def run(*argv):
    """Exit status of a command, that of argparse included."""
    try:
        return cli.main([*argv])
    except SystemExit as done:
        return done.code


@pytest.mark.parametrize('command', [[sys.executable, '-W', 'ignore', '-m', 'traceops'],
                                     ['traceops']], ids=['module', 'script'])
def test_both_ways_to_start_it(command):
    if command == ['traceops']:
        command = [f'{sys.prefix}/bin/traceops']
    done = subprocess.run([*command, '--version'], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, f'traceops {traceops.__version__}\n')
    failed = subprocess.run([*command, 'explain', 'nowhere:f'], text=True, capture_output=True)
    assert failed.returncode == 2


def test_help_lists_every_command(capsys):
    assert run('--help') == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, does) in cli.COMMANDS.items():
        assert any(line.split() == [name, *does.split()] for line in lines)


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_every_command_has_help_of_its_own(command, capsys):
    assert run(command, '--help') == 0
    assert f'usage: traceops {command}' in capsys.readouterr().out


@pytest.mark.parametrize('argv', [(), ('train',), ('status', '--colour'), ('explain',)])
def test_wrong_arguments_are_refused(argv, capsys):
    assert run(*argv) == 2
    assert 'usage: traceops' in capsys.readouterr().err


def test_options_after_a_command_are_its_own_and_so_is_the_exit_status(monkeypatch):
    seen = []
    module = types.SimpleNamespace(main=lambda options: seen.append(options) or 5)
    monkeypatch.setitem(sys.modules, 'traceops.benchmarks', module)
    assert run('bench', '--cases', 'ES*', '--help') == 5
    assert seen == [['--cases', 'ES*', '--help']]


def test_an_error_of_traceops_is_printed_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setenv('TRACEOPS_WINDOW', 'long')
    assert run('status') == 1
    out = capsys.readouterr()
    assert out.out == '' and out.err.startswith('traceops: ') and "'long'" in out.err


def test_any_other_error_is_not_swallowed(monkeypatch):
    def main(options):
        raise ZeroDivisionError
    monkeypatch.setitem(sys.modules, 'traceops.benchmarks', types.SimpleNamespace(main=main))
    assert not issubclass(ZeroDivisionError, TraceopsError)
    with pytest.raises(ZeroDivisionError):
        run('bench')


def test_status(capsys):
    assert run('status') == 0
    assert capsys.readouterr().out == f'{traceops.status()}\n'
    assert run('status', '--json') == 0
    assert json.loads(capsys.readouterr().out) == traceops.status().to_dict()


def test_explain_makes_the_learner_fast(my_net, capsys):
    assert run('explain', 'my_net:learner') == 0
    text = capsys.readouterr().out
    assert 'rnn' in text and 'window' in text and 'etp_mm' in text
    assert run('explain', 'my_net:learner', '--json') == 0
    rows = json.loads(capsys.readouterr().out)['rows']
    assert rows and {row['engine'] for row in rows} == {'window'}
    assert not traceops.installed()


@pytest.mark.parametrize('target, message', [
    ('my_net', 'is not MODULE:FACTORY'), (':learner', 'is not MODULE:FACTORY'),
    ('my_net:', 'is not MODULE:FACTORY'), ('my_net.py:learner', 'is my_net:make'),
    ('my_other_net:learner', "no module 'my_other_net'"),
    ('my_net.deep:learner', "no module 'my_net.deep'"),
    ('my_net:lerner', 'it has: Net, learner, uncompiled, nothing, broken'),
    ('my_net:number', "no function 'number'"),
    ('my_net:nothing', 'returned no compiled learner'),
    ('builtins:print', 'returned no compiled learner'),
    ('json:dumps', "is called without arguments: missing a required argument: 'obj'"),
    ('my_net:uncompiled', 'returned no compiled learner')])
def test_explain_says_what_is_wrong_with_its_target(target, message, my_net, capsys):
    assert run('explain', target) == 2
    assert message in capsys.readouterr().err


def test_explain_shows_errors_of_the_users_own_code(my_net, tmp_path):
    with pytest.raises(KeyError, match='mine'):
        run('explain', 'my_net:broken')
    (tmp_path / 'needs_more.py').write_text('import no_such_module\n')
    with pytest.raises(ModuleNotFoundError, match='no_such_module'):
        run('explain', 'needs_more:learner')


def test_another_traceops_first_on_the_path(tmp_path):
    """The command is this one all the same, and doctor says which is first."""
    (tmp_path / 'traceops').mkdir()
    (tmp_path / 'traceops' / '__init__.py').write_text('x = 1\n')
    code = ("from traceops.cli import main; main(['--version'])",
            'from traceops import cli, doctor; print(doctor.check_import_name())')
    for line, said in zip(code, (f'traceops {traceops.__version__}', 'which is first on the path'),
                          strict=True):
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', line], text=True, capture_output=True,
            cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
        assert said in done.stdout, done.stderr


@pytest.mark.parametrize('missing', ['matplotlib', 'sklearn'])
def test_the_demo_names_its_extra(missing, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.split('.')[0] == missing or n.startswith(
            'traceops.demo.')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert run('demo', '--quick') == 1
    assert capsys.readouterr().out == (
        f"the demo needs {missing}: pip install 'braintrace-traceops[demo]'\n")
