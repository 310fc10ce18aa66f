# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
import dataclasses
import os
import re
import subprocess
import sys
import threading

import pytest

import traceops
from traceops import config, memory
from traceops.errors import SettingsError, TraceopsError

VALUES = {'window': 7, 'memory_budget': 4096, 'carry_trace': False, 'precision': 'tf32',
          'backend': 'jax', 'two_phase': True, 'reuse_memory': True}
TEXTS = {'window': '7', 'memory_budget': '4KiB', 'carry_trace': 'no', 'precision': 'tf32',
         'backend': 'jax', 'two_phase': 'on', 'reuse_memory': '1'}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in config.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)


def test_every_setting_has_a_value_an_environment_variable_and_a_test():
    fields = {f.name for f in dataclasses.fields(traceops.Settings)}
    assert fields == set(config.ENVIRONMENT) == set(VALUES) == set(TEXTS)
    assert dataclasses.asdict(traceops.settings()).items().isdisjoint(VALUES.items())


def test_settings_are_frozen_and_hashable():
    now = traceops.settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        now.window = 3
    assert len({now, dataclasses.replace(now, window=3), traceops.Settings()}) == 2


@pytest.mark.parametrize('field', VALUES)
def test_configure_sets_one_field_and_returns_the_settings_in_force(field):
    before = traceops.settings()
    now = traceops.configure(**{field: VALUES[field]})
    assert now == traceops.settings()
    assert now == dataclasses.replace(before, **{field: VALUES[field]})
    assert traceops.reset() == before == traceops.settings()


@pytest.mark.parametrize('text, number', [
    ('256MiB', 2 ** 28), ('1 GiB', 2 ** 30), ('1.5kib', 1536), ('2GB', 2 * 10 ** 9), ('10', 10),
    ('10 B', 10), ('3MB', 3 * 10 ** 6), ('7kb', 7000)])
def test_memory_budget_as_text(text, number):
    assert traceops.configure(memory_budget=text).memory_budget == number


@pytest.mark.parametrize('field, words', [('precision', ('highest', 'bf16x3', 'bf16x2', 'tf32')),
                                          ('backend', ('auto', 'jax', 'triton'))])
def test_every_word_of_a_choice_is_taken_and_named_when_another_is_not(field, words):
    for word in words:
        assert getattr(traceops.configure(**{field: word}), field) == word
    with pytest.raises(SettingsError) as caught:
        traceops.configure(**{field: 'other'})
    assert f"takes {' or '.join(map(repr, words))}, e.g." in str(caught.value)


ILLEGAL = [
    ('window', 0), ('window', -3), ('window', 2.5), ('window', True), ('window', '7'),
    ('memory_budget', 0), ('memory_budget', -1), ('memory_budget', 1.5), ('memory_budget', '0MiB'),
    ('memory_budget', '12 parsecs'), ('memory_budget', ''), ('memory_budget', [1]),
    ('memory_budget', False), ('memory_budget', '-5MiB'), ('memory_budget', '0.1'),
    ('carry_trace', 1), ('carry_trace', 'no'), ('carry_trace', None),
    ('precision', 'HIGHEST'), ('precision', None), ('precision', ['tf32']),
    ('backend', 'cuda'), ('backend', 0),
]


@pytest.mark.parametrize('field, value', ILLEGAL)
@pytest.mark.parametrize('way', ['configure', 'configured', 'Settings'])
def test_an_illegal_value_is_refused_and_changes_nothing(way, field, value):
    before = traceops.configure(**VALUES)
    with pytest.raises(SettingsError) as caught:
        if way == 'configured':
            with traceops.configured(**{field: value}):
                pytest.fail('the block ran')
        else:
            getattr(traceops, way)(**{field: value})
    assert traceops.settings() == before
    message = str(caught.value)
    assert message.startswith(f'{field}={value!r} is not legal; it takes ')
    example = re.search(r'traceops\.configure\(\w+=.+?\)', message)[0]
    eval(example)                                       # the call in the message is one that works
    assert isinstance(caught.value, TraceopsError) and isinstance(caught.value, ValueError)


def test_configure_inside_a_block_cannot_hide_an_illegal_value():
    with traceops.configured(window=5):
        with pytest.raises(SettingsError):
            traceops.configure(window=-1)
    assert traceops.settings().window is None


@pytest.mark.parametrize('way', [traceops.configure, lambda **kw: traceops.configured(
    **kw).__enter__()])
def test_an_unknown_setting_names_the_known_ones(way):
    before = traceops.settings()
    with pytest.raises(SettingsError) as caught:
        way(widnow=3, precision='tf32')
    assert "'widnow'" in str(caught.value)
    assert all(field in str(caught.value) for field in VALUES)
    assert traceops.settings() == before


def test_blocks_nest_and_are_left_on_an_error():
    traceops.configure(window=2)
    with traceops.configured(window=3, precision='tf32') as outer:
        assert outer == traceops.settings() and outer.window == 3
        with pytest.raises(ZeroDivisionError), traceops.configured(window=None) as inner:
            assert inner.window is None and inner.precision == 'tf32'
            raise ZeroDivisionError
        assert traceops.settings() == outer
        traceops.configure(window=9, backend='jax')     # the block still wins
        assert traceops.settings() == dataclasses.replace(outer, backend='jax')
    assert traceops.settings().window == 9 and traceops.settings().precision == 'highest'


def test_a_block_belongs_to_its_thread_and_the_process_to_all():
    seen = {}

    def look(name):
        seen[name] = traceops.settings()

    traceops.configure(window=4)
    with traceops.configured(precision='tf32'):
        thread = threading.Thread(target=look, args=('other',))
        thread.start()
        thread.join()
        look('here')
    assert (seen['other'].window, seen['other'].precision) == (4, 'highest')
    assert (seen['here'].window, seen['here'].precision) == (4, 'tf32')


def test_threads_that_configure_at_once_lose_nothing():
    start = threading.Barrier(len(VALUES))

    def set_one(field):
        start.wait()
        for _ in range(200):
            traceops.configure(**{field: VALUES[field]})

    threads = [threading.Thread(target=set_one, args=(field,)) for field in VALUES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert traceops.settings() == traceops.Settings(**VALUES)


@pytest.mark.parametrize('field', VALUES)
def test_environment_variables_give_way_to_configure_and_to_a_block(field, monkeypatch):
    default = getattr(traceops.Settings(), field)
    monkeypatch.setenv(config.ENVIRONMENT[field], TEXTS[field])
    assert getattr(traceops.settings(), field) == VALUES[field]
    with traceops.configured(**{field: default}):
        assert getattr(traceops.settings(), field) == default
    traceops.configure(**{field: default})
    assert getattr(traceops.settings(), field) == default


@pytest.mark.parametrize('field, text, value', [
    ('window', 'none', None), ('window', ' ', None), ('carry_trace', '0', False),
    ('carry_trace', 'TRUE', True), ('carry_trace', 'off', False), ('memory_budget', '512', 512)])
def test_environment_spellings(field, text, value, monkeypatch):
    monkeypatch.setenv(config.ENVIRONMENT[field], text)
    assert getattr(traceops.settings(), field) == value


@pytest.mark.parametrize('field, text', [
    ('window', 'many'), ('window', '0'), ('window', '1.5'), ('carry_trace', 'maybe'),
    ('memory_budget', '256 MiBs'), ('precision', 'exact'), ('backend', 'tpu')])
def test_a_bad_environment_variable_is_named_at_first_use(field, text, monkeypatch):
    name = config.ENVIRONMENT[field]
    monkeypatch.setenv(name, text)
    with pytest.raises(SettingsError) as caught:
        traceops.settings()
    message = str(caught.value)
    assert f'{name}={text!r}' in message
    monkeypatch.setenv(name, re.search(rf'e\.g\. {name}=(.+)\.$', message)[1])
    traceops.settings()                                 # the example in the message is legal


@pytest.mark.parametrize('text, asked', [
    ('1', True), ('true', True), ('YES', True), (' on ', True), ('0', False), ('no', False),
    ('', False), (None, False)])
def test_install_asked_by_the_environment(text, asked, monkeypatch):
    monkeypatch.delenv('TRACEOPS_INSTALL', raising=False)
    if text is not None:
        monkeypatch.setenv('TRACEOPS_INSTALL', text)
    assert config.install_asked() is asked


def test_install_at_import():
    """A bad value of a setting does not break the import; one of this variable does."""
    code = """import os, sys
import traceops; print('installed', traceops.installed())
try:
    traceops.settings()
except traceops.errors.SettingsError as err:
    print('refused:', err)
for name in [n for n in sys.modules if n.split('.')[0] == 'traceops']:
    del sys.modules[name]
os.environ['TRACEOPS_INSTALL'] = 'ture'
try:
    import traceops
except ValueError as err:
    print('refused', err)
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], text=True,
                          capture_output=True, env={**os.environ, 'TRACEOPS_INSTALL': 'on',
                                                    'TRACEOPS_WINDOW': 'x'})
    assert done.returncode == 0, done.stderr
    installed, setting, import_ = done.stdout.splitlines()
    assert installed == 'installed True'
    assert setting.startswith("refused: the environment variable TRACEOPS_WINDOW='x'")
    assert import_.startswith('refused') and "TRACEOPS_INSTALL='ture'" in import_


def test_memory_is_reused_only_with_glibc(monkeypatch):
    monkeypatch.setattr(memory, 'able', lambda: False)
    with pytest.raises(SettingsError, match='reuse_memory=True is not legal; .*glibc'):
        traceops.configure(reuse_memory=True)
    assert not traceops.settings().reuse_memory
