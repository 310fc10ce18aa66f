# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The README's code runs, and is near its beginning."""

import pathlib
import re

import jax
import numpy as np

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


def test_the_example_runs_and_learns(capsys):
    code = re.search(r'```python\n(.*?)```', README, re.S)
    names = {}
    exec(compile(code[1], 'README.md', 'exec'), names)
    assert any(np.linalg.norm(g) > 0 for g in jax.tree.leaves(names['grads']))
    assert 'window' in capsys.readouterr().out


def test_the_example_is_within_the_first_lines():
    lines = README.splitlines()
    assert lines.index('```python') < 30 and 'make demo' in ' '.join(lines[:12])
