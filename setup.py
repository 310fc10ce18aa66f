# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Build of ``braintrace-traceops``, which installs one top-level package: ``traceops``.

``kernels/`` and ``benchmarks/`` lie at the top of the repository and install inside it, as
``traceops.kernels`` and ``traceops.benchmarks``. Settings of the tools are in pyproject.toml.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
FOLDERS = {
    'traceops': 'traceops',
    'traceops.kernels': 'kernels',
    'traceops.benchmarks': 'benchmarks',
}
DEMO = ['matplotlib>=3.8', 'scikit-learn>=1.3']
TEST = [*DEMO, 'build>=1.2', 'hypothesis>=6.100', 'numba>=0.60',
        'orbax-checkpoint>=0.11', 'pytest>=8.1', 'pytest-xdist>=3.5',
        'setuptools>=77', 'sybil>=9']
DOCS = ['furo>=2024.8', 'matplotlib>=3.8', 'myst-nb>=1.3', 'sphinx>=8']
PEERS = ['norse>=1.1', 'snntorch>=0.9', 'spikingjelly>=0.0.0.0.14', 'spyx>=0.1.20']


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding='utf-8')


def version() -> str:
    match = re.search(r"^__version__ = '([^']+)'$", read('traceops/__init__.py'), re.M)
    if match is None:
        raise RuntimeError('traceops/__init__.py has no line '
                           "like __version__ = '1.2.3'")
    return match[1]


setup(
    name='braintrace-traceops',
    version=version(),
    description='Accelerator backend for online learning with eligibility traces in JAX',
    long_description=read('README.md') if (ROOT / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    license_expression='Apache-2.0',
    license_files=['LICENSE'],
    keywords=['jax', 'brainstate', 'braintrace', 'eligibility trace', 'online learning', 'RTRL',
              'spiking neural network'],
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    packages=[package for name, folder in FOLDERS.items()
              for package in (name, *(f'{name}.{sub}' for sub in find_packages(folder)))],
    package_dir=FOLDERS,
    package_data={'traceops': ['py.typed']},
    python_requires='>=3.11,<3.14',
    install_requires=[
        'braintrace>=0.2.6,<0.2.9',
        'brainevent>=0.2',
        'jax>=0.10,<0.13',
        'jaxlib>=0.10,<0.13',
        'brainstate>=0.5.4,<0.7',
        'brainpy>=2.8.2,<2.10',
        'braintools>=0.3,<0.5',
        'saiunit>=0.5.2,<0.7',
        'numpy>=2.0',
        'packaging>=23',
        'platformdirs>=4',
        'rich>=13',
        'scipy>=1.14',
        'tqdm>=4.60',
    ],
    extras_require={
        'gpu': ['jax[cuda12]', 'jax-triton>=0.3.1', 'triton>=3.5'],
        'demo': DEMO,
        'test': TEST,
        'dev': [*TEST, 'mypy>=1.11', 'ruff>=0.6'],
        'docs': DOCS,
        'peers': PEERS,
    },
    entry_points={'console_scripts': ['traceops = traceops.cli:main']},
)
