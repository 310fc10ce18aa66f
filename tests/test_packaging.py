# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
import ast
import configparser
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import traceops

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = {'traceops': 'traceops', 'kernels': 'traceops/kernels',
           'benchmarks': 'traceops/benchmarks'}

pytestmark = pytest.mark.skipif(not (ROOT / 'setup.py').exists(),
                                reason='these tests build the package from its source tree')


def sources():
    """Where each module of the source tree belongs in an installation."""
    return {f'{installed}/{path.relative_to(ROOT / folder).as_posix()}'
            for folder, installed in FOLDERS.items() for path in (ROOT / folder).rglob('*.py')}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """sdist, and the wheel made from that sdist, of a copy of the source tree."""
    copy = tmp_path_factory.mktemp('build') / 'source'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        '.git', '.venv*', '.*_cache', '.hypothesis', '*.egg-info', '__pycache__', 'build', 'dist',
        'out'))
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', str(copy)],
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,), (sdist,) = (copy / 'dist').glob('*.whl'), (copy / 'dist').glob('*.tar.gz')
    return wheel, sdist


@pytest.fixture(scope='module')
def wheel(built):
    return zipfile.ZipFile(built[0])


@pytest.fixture(scope='module')
def metadata(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith('.dist-info/METADATA')]
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_every_module_and_no_other_top_level_package(wheel):
    files = [n for n in wheel.namelist() if '.dist-info/' not in n]
    assert {n.split('/')[0] for n in files} == {'traceops'}
    assert {n for n in files if n.endswith('.py')} == sources()
    assert {n for n in files if not n.endswith('.py')} == {'traceops/py.typed'}


def test_the_metadata_of_the_wheel(wheel, metadata):
    assert metadata['Name'] == 'braintrace-traceops'
    assert metadata['Version'] == traceops.__version__
    assert metadata['License-Expression'] == 'Apache-2.0'
    assert any(n.endswith('licenses/LICENSE') for n in wheel.namelist())
    (name,) = [n for n in wheel.namelist() if n.endswith('entry_points.txt')]
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(name).decode())
    assert dict(scripts['console_scripts']) == {'traceops': 'traceops.cli:main'}


def test_requirements(metadata):
    requirements = [Requirement(text) for text in metadata.get_all('Requires-Dist')]
    core = {r.name for r in requirements if r.marker is None}
    assert {'braintrace', 'jax', 'jaxlib', 'brainstate', 'brainpy', 'braintools', 'saiunit',
            'numpy'} <= core
    assert not any(re.search(r'cuda|triton|nvidia|rocm', str(r))
                   for r in requirements if r.marker is None)
    assert set(metadata.get_all('Provides-Extra')) == {
        'gpu', 'demo', 'test', 'dev', 'docs', 'peers'}
    gpu = {r.name for r in requirements if r.marker and r.marker.evaluate({'extra': 'gpu'})}
    assert gpu == {'jax', 'jax-triton', 'triton'}


def imported(path):
    """Top-level names of the modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return {name.name.split('.')[0] for node in nodes if isinstance(node, ast.Import)
            for name in node.names} | \
        {node.module.split('.')[0] for node in nodes if isinstance(node, ast.ImportFrom)}


def test_every_import_of_the_package_is_a_requirement(metadata):
    """The demo and the plots may use their own extra, operations and kernels that of the GPU."""
    distributions = {'sklearn': 'scikit-learn', 'jax_triton': 'jax-triton'}
    requirements = [Requirement(text) for text in metadata.get_all('Requires-Dist')]
    declared = {extra: {r.name for r in requirements
                        if r.marker is None or r.marker.evaluate({'extra': extra})}
                for extra in ('', 'demo', 'gpu', 'peers')}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob('*.py'):
            found = imported(path) - {*sys.stdlib_module_names, 'traceops'}
            place = path.relative_to(ROOT).as_posix()
            extra = 'gpu' if place.startswith(('kernels/', 'traceops/ops/')) else \
                'demo' if place.startswith('traceops/demo/') or path.name == 'plots.py' else ''
            missing = {distributions.get(m, m) for m in found} - declared[extra]
            assert not missing, f'{place} imports {missing}'


def test_the_sdist_holds_what_a_fresh_clone_does(built):
    with tarfile.open(built[1]) as archive:
        names = {n.split('/', 1)[1] for n in archive.getnames() if '/' in n}
    assert {'setup.py', 'pyproject.toml', 'Makefile', 'LICENSE', 'CHANGELOG.md', 'CONTRIBUTING.md',
            'tools/find-python', 'tools/make-venv', '.ci/run', 'tests/conftest.py',
            'examples/README.md', 'examples/evidence.py', 'docs/index.md', 'docs/images/window.svg',
            'CITATION.cff', 'SECURITY.md', '.github/workflows/ci.yml'} <= names
    assert {path.relative_to(ROOT).as_posix() for folder in FOLDERS
            for path in (ROOT / folder).rglob('*.py')} <= names


IMPORT = '''
import sys, traceops, traceops.kernels, traceops.benchmarks
import traceops.kernels.adjoint_window.reference
import importlib.util
print(traceops.__file__)
print([m for m in ('kernels', 'benchmarks') if importlib.util.find_spec(m)])
'''


def where(folder, path=''):
    """``traceops.__file__`` and the generic top-level names, seen from ``folder``."""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', IMPORT], cwd=folder, text=True,
                          capture_output=True, env={'PYTHONPATH': str(path)})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_wheel_is_importable_on_its_own(wheel, tmp_path):
    wheel.extractall(tmp_path / 'site')
    (tmp_path / 'empty').mkdir()
    file, generic = where(tmp_path / 'empty', tmp_path / 'site')
    assert pathlib.Path(file) == tmp_path / 'site/traceops/__init__.py'
    assert generic == '[]'


def test_the_installed_package_is_importable_from_anywhere(tmp_path):
    file, generic = where(tmp_path)
    assert pathlib.Path(file).name == '__init__.py' and generic == '[]'


def test_find_python_knows_the_range_of_the_package(metadata):
    low, high = re.search(r'\((3, \d+)\) <= sys.version_info.* < \((3, \d+)\)',
                          (ROOT / 'tools/find-python').read_text()).groups()
    text = f'>={low},<{high}'.replace(', ', '.')
    assert SpecifierSet(metadata['Requires-Python']) == SpecifierSet(text)


def find_python(*names):
    return subprocess.run([ROOT / 'tools/find-python', *names], text=True, capture_output=True)


def test_find_python_takes_the_first_that_works(tmp_path):
    old, refuses = tmp_path / 'python3.8', tmp_path / 'python3.99'
    old.write_text('#!/bin/sh\nexit 1\n')               # as the check does in an old Python
    refuses.write_text('#!/bin/sh\necho "command not found" >&2\nexit 127\n')
    for path in (old, refuses):
        path.chmod(0o755)
    found = find_python('no-such-python', str(old), str(refuses), sys.executable)
    assert (found.returncode, found.stdout) == (0, f'{sys.executable}\n'), found.stderr
    none = find_python('no-such-python', str(refuses))
    assert none.returncode == 1 and none.stdout == '' and 'no-such-python' in none.stderr


def test_make_says_which_python_is_missing():
    done = subprocess.run(['make', 'test', 'PYTHON=no-such-python'], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode != 0
    assert 'no-such-python' in done.stderr and 'PYTHON=python3.12' in done.stderr


def test_every_source_file_names_its_licence():
    scripts = [ROOT / name for name in ('Makefile', '.ci/run', 'tools/find-python',
                                        'tools/make-venv', 'setup.py')]
    modules = [path for folder in (*FOLDERS, 'docs', 'examples', 'tests')
               for path in (ROOT / folder).rglob('*.py')]
    for path in [*scripts, *modules]:
        text = path.read_text()
        assert not text or 'SPDX-License-Identifier: Apache-2.0' in text[:200], path
