# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What was measured on a device decides; without a file, or with a bad one, the tables do."""

import json

import jax
import platformdirs
import pytest

from tests.ops.steps import operands_of
from traceops import cli, doctor, ops
from traceops.benchmarks import tune
from traceops.kernels.simulate_window import launch
from traceops.ops import choice, measured
from traceops.ops.simulate_window import SIMULATE_WINDOW

KIND = 'NVIDIA H200'
HERE = choice.Place('interpret', 90, KIND)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache directory of the test's own, and kernels that are not tried."""
    monkeypatch.setattr(platformdirs, 'user_cache_path', lambda name: tmp_path / name)
    monkeypatch.setenv('TRACEOPS_CHECK_KERNELS', '0')
    measured.forget()
    yield tmp_path
    measured.forget()


def simulation_of(name, **sizes):
    return ops.Simulation(*operands_of(name, **sizes))


def decided(simulation, request='auto'):
    return choice.decide(SIMULATE_WINDOW, simulation.operands, {'step': simulation.step}, request,
                         HERE)


def keys_of(simulation):
    return launch.measured_as(*simulation.operands, step=simulation.step)


def test_the_file_decides_and_why_quotes_it():
    simulation = simulation_of('lif', N=100, batch=(5,))
    exact, size = keys_of(simulation)
    assert size == 'events, 128 neurons, 8 samples' and exact.endswith(', 8 samples')
    assert decided(simulation).backend == 'triton'
    measured.write(KIND, {size: measured.Measured(1590.4, 71.2, True)})
    assert decided(simulation) == ops.Decision('jax', 'measured here: 1590 us against 71 us')
    # the step itself before a layer of its size; what is there is kept
    measured.write(KIND, {exact: measured.Measured(71.2, 1590.4, True)})
    assert decided(simulation) == ops.Decision(
        'triton', 'kernel, measured here: 71 us against 1590 us')
    assert len(measured.known(KIND)) == 2
    assert decided(simulation_of('alif', N=100, batch=(5,))).backend == 'jax'      # by its size
    assert decided(simulation_of('lif', N=100, batch=(9,))).reason.startswith('kernel, not checked')


def test_a_kernel_that_is_wrong_is_not_used_and_one_that_is_asked_for_is():
    simulation = simulation_of('lif')
    measured.write(KIND, {keys_of(simulation)[0]: measured.Measured(
        float('inf'), 70., False, 'it differs from the reference by 1e-01')})
    assert decided(simulation) == ops.Decision(
        'jax', 'tried here: it differs from the reference by 1e-01')
    assert decided(simulation, 'triton').backend == 'triton'


def test_what_was_measured_is_before_what_a_table_believes():
    simulation = simulation_of('gru', T=2, N=256)
    assert 'KiB' in decided(simulation).reason
    measured.write(KIND, {keys_of(simulation)[1]: measured.Measured(10., 20., True)})
    assert decided(simulation).backend == 'triton'


@pytest.mark.parametrize('text, said', [
    ('{', 'is damaged, and ignored (JSONDecodeError'),
    ('[]', 'is damaged, and ignored (TypeError'),
    ('{"format": 1, "device": "NVIDIA H200", "verdicts": {"a": {"kernel": "1;2"}}}',
     'is damaged, and ignored (TypeError'),
    ('{"format": 1, "device": "NVIDIA H200", "verdicts": {"a": {"kernel": -1, "reference": 2, '
     '"right": true, "detail": ""}}}', 'is damaged, and ignored (ValueError'),
    ('{"format": 1, "device": "NVIDIA A100", "verdicts": {}}', 'is of another device or form'),
    ('{"format": 99, "device": "NVIDIA H200", "verdicts": {}}', 'is of another device or form'),
    ('\x00\xff', 'is damaged, and ignored')])
def test_a_file_that_is_bad_is_ignored_with_a_line_in_doctor(text, said):
    path = measured.file_of(KIND)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode('latin-1'))
    assert decided(simulation_of('lif')).backend == 'triton' and not measured.known(KIND)
    check = doctor.check_measurements(KIND)
    assert check.passed and said in check.found and 'tune' in check.advice
    measured.write(KIND, {'a': measured.Measured(1., 2., True)})        # and is written anew
    assert [*measured.known(KIND)] == ['a'] and not measured.problem(KIND)


def test_a_cache_directory_that_cannot_be_read(monkeypatch):
    def nowhere(name):
        raise RuntimeError('no home')
    monkeypatch.setattr(platformdirs, 'user_cache_path', nowhere)
    measured.forget()
    assert decided(simulation_of('lif')).backend == 'triton'
    assert 'RuntimeError: no home' in doctor.check_measurements(KIND).found


def test_doctor_says_what_there_is():
    assert 'none of this device' in doctor.check_measurements(KIND).found
    path = measured.write(KIND, {'a': measured.Measured(1., 2., True),
                                 'b': measured.Measured(3., 2., True)})
    assert doctor.check_measurements(KIND).found == f'2 of this device, the kernel in 1: {path}'
    assert json.loads(path.read_text())['device'] == KIND
    assert 'nvidia-h200' in path.name and jax.__version__ in path.name


def test_tune_without_a_gpu_says_so(capsys):
    assert cli.main(['tune']) == 1
    assert 'tune times kernels on a GPU, and jax runs on cpu' in capsys.readouterr().err


LEARNER = '''
import braintrace, brainstate, jax.numpy as jnp, saiunit as u
from traceops.benchmarks.nets import make

def learner():
    brainstate.environ.set(dt=1. * u.ms)
    return braintrace.compile(make('alif', 20, 32, 3), 'ES_D_RTRL', jnp.zeros((4, 20)),
                              batch_size=4, decay_or_rank=.9)
'''


def test_tune_of_a_learner_and_of_sizes(tmp_path, monkeypatch, capsys):
    """All but the timing, which needs a device: that is a fake here."""
    (tmp_path / 'their_learner.py').write_text(LEARNER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tune.jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(tune.choice, 'cuda_place', lambda: HERE)
    monkeypatch.setattr(tune, 'trial', lambda *a: (True, 'checked'))
    monkeypatch.setattr(tune, '_time', lambda simulation, backend, *a: {
        'triton': 30., 'jax': 400.}[backend])
    assert cli.main(['tune', 'their_learner:learner']) == 0
    out = capsys.readouterr().out
    assert 'kernel' in out and str(tmp_path) in out.replace('\n', '')
    names = {*measured.known(KIND)}                 # of the net, and of its readout
    assert len(names) == 2
    assert all(n.startswith('step_') and n.endswith(', 4 samples') for n in names)
    monkeypatch.setattr(tune, 'SIZES', {'events': ((128,), (8,)), 'all rows': ((64,), (8,))})
    assert cli.main(['tune', '--steps', '3']) == 0
    assert {*measured.known(KIND)} == names | {
        'events, 128 neurons, 8 samples', 'all rows, 64 neurons, 8 samples'}
