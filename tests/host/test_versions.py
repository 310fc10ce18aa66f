# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

import traceops
from traceops.errors import TraceopsError, UnsupportedVersionError
from traceops.host import versions

pytestmark = pytest.mark.usefixtures('compiled_quickly')

GOOD = {'braintrace': '0.2.8', 'jax': '0.12.0.1'}


@pytest.mark.parametrize('found', [
    GOOD, {'braintrace': '0.2.6', 'jax': '0.10'}, {'braintrace': '0.2.8.post1', 'jax': '0.11.3'},
    {'braintrace': '0.2.7.dev3', 'jax': '0.12.5.dev20270101'}])
def test_the_supported_range(found):
    assert versions.check(found) is None


@pytest.mark.parametrize('name, version', [
    ('braintrace', '0.2.5'), ('braintrace', '0.2.9'), ('braintrace', '1.0'), ('braintrace', None),
    ('braintrace', 'unknown'), ('jax', '0.9.2'), ('jax', '0.13.0'), ('jax', '0.13.0rc1'),
    ('jax', None)])
def test_outside_it_one_message_names_range_and_version(name, version):
    other = ({*GOOD} - {name}).pop()
    with pytest.raises(UnsupportedVersionError) as caught:
        versions.check({**GOOD, name: version})
    message = str(caught.value)
    assert f'{name} {version or "(not installed)"}, only {versions.SUPPORTED[name]}' in message
    assert f'{other} {GOOD[other]}' not in message
    pins = re.findall(r"'([^']+)'", message.partition('pip install')[2])
    assert {Requirement(pin).name for pin in pins} == {'braintrace', 'jax'}
    assert isinstance(caught.value, TraceopsError)


def test_both_out_of_range_give_one_message():
    with pytest.raises(UnsupportedVersionError, match=r'braintrace 9, .*jax 8, '):
        versions.check({'braintrace': '9', 'jax': '8'})


def test_the_installed_versions_are_looked_at_and_supported():
    assert versions.installed_versions() == {n: metadata.version(n) for n in versions.SUPPORTED}
    versions.check()


@pytest.mark.parametrize('way', [traceops.install, lambda: traceops.enabled().__enter__()])
def test_install_checks_before_it_patches(way, monkeypatch):
    monkeypatch.setattr(versions, 'installed_versions', lambda: {**GOOD, 'jax': '0.13'})
    with pytest.raises(UnsupportedVersionError, match='jax 0.13, only'):
        way()
    assert not traceops.installed()
    monkeypatch.undo()
    traceops.install()
    assert traceops.installed()


def test_the_package_metadata_declares_the_same_range():
    declared = {r.name: r.specifier for r in map(Requirement, metadata.requires(
        'braintrace-traceops')) if r.marker is None}
    assert {name: declared[name] for name in versions.SUPPORTED} == versions.SUPPORTED


def test_an_unsupported_braintrace_is_refused_at_install_not_at_import(tmp_path):
    """A stand-in for a later braintrace in which nothing is where it was."""
    (tmp_path / 'braintrace').mkdir()
    (tmp_path / 'braintrace/__init__.py').write_text("__version__ = '9.0'\n")
    info = tmp_path / 'braintrace-9.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: braintrace\nVersion: 9.0\n')
    code = ('import traceops\n'
            'print(traceops.status().versions["braintrace"])\n'
            'try:\n    traceops.install()\n'
            'except traceops.errors.UnsupportedVersionError as err:\n    print("refused:", err)')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == '9.0'
    assert second.startswith('refused: ') and '9.0' in second
    assert str(versions.SUPPORTED['braintrace']) in second
