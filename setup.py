# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``kernels/`` and ``benchmarks/`` of the top level install inside the package."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '([^']+)'", (ROOT / 'traceops/__init__.py').read_text())[1]
DEMO = ['scikit-learn', 'matplotlib', 'tqdm']
TEST = ['pytest', 'hypothesis', 'pytest-xdist', *DEMO]

packages = {'traceops': 'traceops', 'traceops.kernels': 'kernels',
            'traceops.benchmarks': 'benchmarks'}
names = [full for top, folder in packages.items()
         for full in [top, *(f'{top}.{sub}' for sub in find_packages(folder))]]

setup(
    name='braintrace-traceops',
    version=VERSION,
    description='Accelerator backend for online learning with eligibility traces in JAX',
    long_description=(ROOT / 'README.md').read_text() if (ROOT / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=names,
    package_dir={name: packages[name] for name in packages},
    package_data={'traceops': ['py.typed']},
    python_requires='>=3.11,<3.14',
    install_requires=[
        'jax>=0.10,<0.13', 'jaxlib>=0.10,<0.13', 'braintrace>=0.2.6,<0.2.9',
        'brainstate>=0.5.4', 'brainpy>=2.8', 'braintools>=0.3', 'saiunit>=0.5', 'numpy',
        'packaging', 'rich',
    ],
    extras_require={
        'gpu': ['jax-triton>=0.3.1', 'triton>=3.5', 'jax[cuda12]'],
        'demo': DEMO,
        'test': TEST,
        'dev': [*TEST, 'ruff', 'mypy', 'build'],
    },
    entry_points={'console_scripts': ['traceops = traceops.cli:main']},
)
