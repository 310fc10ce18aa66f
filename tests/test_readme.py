# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The README's code runs, and is near its beginning."""

import pathlib
import re

import jax
import numpy as np

import traceops
from traceops import cli, config

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_the_example_runs_and_learns(capsys):
    names = {}
    for code in re.findall(r'```python\n(.*?)```', README, re.S):
        exec(compile(code, 'README.md', 'exec'), names)
    assert any(np.linalg.norm(g) > 0 for g in jax.tree.leaves(names['grads']))
    assert 'window' in capsys.readouterr().out


def test_the_example_is_within_the_first_lines():
    lines = README.splitlines()
    assert lines.index('```python') < 30 and 'make demo' in ' '.join(lines[:12])


def test_the_settings_are_those_there_are():
    rows = re.findall(r'^\| `(\w+)=(.+?)` \| `(\w+)` \|', README, re.M)
    assert {name: env for name, _, env in rows} == config.ENVIRONMENT
    for name, default, _ in rows:
        assert traceops.Settings(**{name: eval(default)}) == traceops.Settings()


def test_commands_targets_and_files_that_it_names_exist():
    said = re.search(r'The command `traceops` has (.*?)\.\n', README, re.S)[1]
    assert {word.split()[0] for word in re.findall(r'`(.*?)`', said)} == set(cli.COMMANDS)
    rules = re.findall(r'^([\w -]+):', (ROOT / 'Makefile').read_text(), re.M)
    targets = {target for rule in rules for target in rule.split()}
    assert set(re.findall(r'`make ([\w-]+)', README) + ['demo', 'test']) <= targets
    assert all((ROOT / name).exists() for name in re.findall(r'`(\w+\.md)`', README))
