# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
import pathlib
import zlib

import pytest


def pytest_configure(config):
    """A process that only hands out tests does without jax: those that run them start sooner."""
    hands_out = config.getoption('tx', None) and config.getoption('dist') != 'no'
    if hasattr(config, 'workerinput') or not hands_out:
        from tests import fixtures
        config.pluginmanager.register(fixtures)


def pytest_addoption(parser):
    parser.addoption('--half', type=int, choices=(1, 2),
                     help='half of the tests and cases, and this half of the tests of commands; '
                          'the other half runs on another Python')


#: What runs whole commands, most of it the same whatever the versions: in one of the halves.
COMMANDS = 'benchmarks', 'demo', 'examples', 'gpufree', 'test_docs.py', 'test_packaging.py'
#: What is about the versions of jax and braintrace themselves: in both halves.
VERSIONS = 'test_upstream.py', 'test_versions.py'


def _other_half(config, items):
    """Half of the tests and cases, by their names, but for those about commands and versions."""
    half, tests = config.getoption('half'), pathlib.Path(__file__).parent
    for item in items:
        if half and item.path.relative_to(tests).parts[0] in COMMANDS:
            if half == 2:
                yield item
        elif half and item.path.name not in VERSIONS and \
                zlib.crc32(item.nodeid.encode()) % 2 == half % 2:
            yield item


@pytest.hookimpl(trylast=True)          # after -m and -k
def pytest_collection_modifyitems(config, items):
    """What is for the other platform is skipped; what is for a CPU says why, each in its mark."""
    left_out = list(_other_half(config, items))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    import jax
    other = 'cpu' if any(d.platform == 'gpu' for d in jax.devices()) else 'gpu'
    for item in items:
        mark = item.get_closest_marker(other)
        if mark:
            reason, = mark.args or ('no GPU that jax sees: these tests run a kernel on one',)
            item.add_marker(pytest.mark.skip(reason=reason))
