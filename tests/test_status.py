# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import platform
import subprocess
import sys
from importlib import metadata

import jax
import pytest

import traceops


def test_versions_are_those_installed():
    found = traceops.status().versions
    assert found['python'] == platform.python_version()
    assert found['traceops'] == traceops.__version__
    for name in ('braintrace', 'brainstate', 'brainpy', 'braintools', 'saiunit', 'jax', 'jaxlib'):
        assert found[name] == metadata.version(name)
    assert {'triton', 'jax_triton'} <= set(found)


def test_it_says_whether_traceops_is_installed():
    assert not traceops.status().installed
    assert 'traceops.install() makes' in str(traceops.status())
    traceops.install()
    assert traceops.status().installed
    assert 'traceops.install() makes' not in str(traceops.status())
    traceops.uninstall()
    with traceops.enabled():
        assert traceops.status().installed


def test_settings_are_those_in_force():
    with traceops.configured(window=11):
        now = traceops.status()
    assert now.settings.window == 11 and traceops.status().settings.window is None
    row = next(line for line in str(now).splitlines() if 'window' in line)
    assert '11' in row


def test_what_decides_on_a_setting_left_open():
    rows = dict(line.strip('│ ').split('│', 1) for line in str(traceops.status()).splitlines()
                if line.startswith('│'))
    said = {name.strip(): text.strip() for name, text in rows.items()}
    assert said['memory_budget'] == '256 MiB, on a GPU 1 GiB'
    assert said['window'] == 'chosen within memory_budget' and said['two_phase'] == 'on a GPU'


def test_environment_variables_that_are_set_are_seen(monkeypatch):
    monkeypatch.setenv('TRACEOPS_WINDOW', '13')
    monkeypatch.setenv('TRACEOPS_PRECISION', '')
    now = traceops.status()
    assert now.environment['TRACEOPS_WINDOW'] == '13'
    assert 'TRACEOPS_PRECISION' not in now.environment
    assert 'TRACEOPS_WINDOW' in str(now)


def test_every_fact_is_printed_and_in_the_dict():
    now = traceops.status()
    as_dict = json.loads(json.dumps(now.to_dict()))
    assert set(as_dict) == {'versions', 'devices', 'device_error', 'installed', 'settings',
                            'environment', 'kernels'}
    assert len(as_dict['devices']) == jax.device_count()
    text = str(now)
    for name, version in as_dict['versions'].items():
        assert name in text and (version or 'not installed') in text
    assert all(name in text for name in as_dict['settings'])


def test_a_jax_that_cannot_start_is_a_fact_like_any_other():
    code = ('import traceops; now = traceops.status(); print(now)\n'
            'assert now.devices == () and "nonsense" in now.device_error')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], text=True,
                          capture_output=True, env={**os.environ, 'JAX_PLATFORMS': 'nonsense'})
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if 'devices' in line]
    assert 'none: ' in row and 'nonsense' in done.stdout


@pytest.mark.parametrize('module', ['triton', 'jax_triton'])
def test_triton_is_not_imported_to_learn_its_version(module):
    code = f'import sys, traceops; str(traceops.status()); print({module!r} in sys.modules)'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], text=True,
                          capture_output=True)
    assert done.stdout.strip() == 'False', done.stderr
