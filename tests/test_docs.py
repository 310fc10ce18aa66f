# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the pages runs, page by page; what they name exists."""

import pathlib
import re

import matplotlib
import pytest
from sybil.document import Document
from sybil.parsers.myst import PythonCodeBlockParser

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob('*.md'))}


def blocks(path):
    document = Document.parse(str(path), PythonCodeBlockParser())
    return list(document.examples())


# Tutorials are run by every `make docs` too, which shows what they print.
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow if name.startswith('tutorials/') else ())
    for name, path in PAGES.items() if blocks(path)])
def test_the_code_of_a_page_runs(name, compiled_quickly):
    matplotlib.use('Agg')
    for block in blocks(PAGES[name]):
        block.evaluate()


def test_every_python_block_is_found():
    """A block that the parser does not recognise would not be run."""
    for path in PAGES.values():
        assert len(blocks(path)) == len(re.findall(
            r'^```(python|\{code-cell\} python)$', path.read_text(), re.M)), path
    assert sum(len(blocks(path)) for path in PAGES.values()) > 20


def test_tests_and_files_that_a_page_names_exist():
    for name, path in PAGES.items():
        text = path.read_text()
        for file, test in re.findall(r'`(tests/[\w/]+\.py)(?:::(\w+))?`', text):
            assert (ROOT / file).exists(), (name, file)
            assert f'def {test}(' in (ROOT / file).read_text() or not test, (name, test)
        for file in re.findall(r'`((?:kernels|examples|traceops)/[\w/]+\.(?:py|md))`', text):
            assert (ROOT / file).exists(), (name, file)
        rules = re.findall(r'^([\w -]+):', (ROOT / 'Makefile').read_text(), re.M)
        targets = {target for rule in rules for target in rule.split()}
        assert set(re.findall(r'`make ([\w-]+)', text)) <= targets, name


def test_every_page_is_in_the_contents():
    contents = set(re.findall(r'^([\w/-]+)$', PAGES['index.md'].read_text(), re.M))
    assert {name.removesuffix('.md') for name in PAGES} - {'index'} <= contents
