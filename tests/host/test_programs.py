# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What ``explain`` prints of training programs as people write them.

``programs/*.md`` are one program of each kind, and what ``explain`` says of it, asked in three
ways, as somebody reads it who has never seen the project. ``TRACEOPS_RECORD=1`` writes what it says
now into them: read the difference.
"""

import os
import pathlib
import re

import brainstate
import braintools
import braintrace
import jax
import jax.numpy as jnp
import pytest

import traceops
from tests.parity import nets
from traceops.host import faults, loops, seen

#: Whose learner or net is made from the values of arrays.
COMPUTED = ('another_engine', 'sparse')
PROGRAMS = sorted((pathlib.Path(__file__).parent / 'programs').glob('*.md'))


def said_of(name, text, monkeypatch):
    """What ``explain`` prints of a program's function, of its learner, and of all that was seen."""
    monkeypatch.setattr(seen, '_known', {})
    monkeypatch.setattr(loops, '_known', {})
    monkeypatch.setattr(faults, 'notes', lambda *_: [])     # they differ from version to version
    brainstate.random.seed(0)
    given = {'brainstate': brainstate, 'braintools': braintools, 'braintrace': braintrace,
             'jax': jax, 'jnp': jnp, 'nets': nets, 'traceops': traceops, 'made': []}
    if 'accelerate' not in text:
        traceops.install()
    [code] = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    exec(compile(code, f'{name}.py', 'exec'), given)
    of_function = traceops.explain(given['train_step'], *given['args'])
    [learner] = given['made'][-1:] or [given['learner']]
    said = {'train_step, *args': of_function, 'learner': traceops.explain(learner), '': None}
    return '\n'.join(f'explain({what})\n{traceops.explain() if one is None else one}\n'
                     for what, one in said.items())


@pytest.mark.cpu('on a GPU explain says more: of kernels')
@pytest.mark.parametrize('path', PROGRAMS, ids=lambda path: path.stem)
def test_what_explain_prints(path, monkeypatch):
    text = path.read_text()
    program, _, before = text.partition('```text\n')
    said = []

    def ask():
        said.append(said_of(path.stem, program, monkeypatch))
    if path.stem in COMPUTED:
        ask()
    else:                   # traced as a whole: nothing is computed, and nothing compiled
        brainstate.transform.make_jaxpr(ask)()
    [now] = said
    if os.environ.get('TRACEOPS_RECORD'):
        path.write_text(f'{program.rstrip()}\n\n```text\n{now}```\n')
    else:
        assert now == before.removesuffix('```\n')
