# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The README's code runs and learns; what it and the pages say of settings and files is so."""

import pathlib
import re

import jax
import numpy as np
import pytest

import traceops
from traceops import cli, config

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_the_example_runs_and_learns(capsys):
    names = {}
    for code in re.findall(r'```python\n(.*?)```', README, re.S):
        exec(compile(code, 'README.md', 'exec'), names)
    assert names['losses'][-1] < 0.5 * names['losses'][0]
    assert 'window' in capsys.readouterr().out
    weights = names['learner'].param_states
    before = {path: w.value for path, w in weights.items()}
    names['train'](names['xs'], 2 * names['ys'])
    moved = {path[0] for path, w in weights.items() if any(
        np.linalg.norm(a - b) > 0 for a, b in zip(
            *map(jax.tree.leaves, (before[path], w.value)), strict=True))}
    assert moved == {'rnn', 'out'}


def test_the_example_is_within_the_first_lines():
    lines = README.splitlines()
    assert lines.index('```python') < 30 and 'make demo' in ' '.join(lines[:12])


def test_the_settings_are_those_there_are():
    text = (ROOT / 'docs/guides/migrating.md').read_text()
    rows = re.findall(r'^\| `(\w+)=(.+?)` \| `(\w+)` \|', text, re.M)
    assert {name: env for name, _, env in rows} == config.ENVIRONMENT
    for name, default, _ in rows:
        assert traceops.Settings(**{name: eval(default)}) == traceops.Settings()


def test_commands_targets_and_files_that_it_names_exist():
    said = re.search(r'The command `traceops` has (.*?)\.\n', README, re.S)[1]
    assert {word.split()[0] for word in re.findall(r'`(.*?)`', said)} == set(cli.COMMANDS)
    rules = re.findall(r'^([\w -]+):', (ROOT / 'Makefile').read_text(), re.M)
    targets = {target for rule in rules for target in rule.split()}
    assert set(re.findall(r'`make ([\w-]+)', README) + ['demo', 'test']) <= targets
    files = re.findall(r'`(\w+\.md)`', README) + re.findall(r'\]\((docs/[^)#]+)', README)
    assert len(files) > 15 and all((ROOT / name).exists() for name in files)


def test_it_fits_two_screens():
    assert len(README.splitlines()) < 120
