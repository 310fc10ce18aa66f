# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
import brainstate
import jax
import pytest
import saiunit as u

import traceops


@pytest.fixture(autouse=True)
def clean():
    """Every test starts and ends with traceops not installed and nothing configured."""
    brainstate.environ.set(dt=1. * u.ms)
    yield
    traceops.uninstall()
    traceops.reset()


@pytest.fixture
def float64():
    """Double precision for one test."""
    brainstate.environ.set(precision=64)
    jax.config.update('jax_enable_x64', True)
    yield
    brainstate.environ.set(precision=32)
    jax.config.update('jax_enable_x64', False)


def pytest_collection_modifyitems(items):
    if any(d.platform == 'gpu' for d in jax.devices()):
        return
    for item in items:
        if item.get_closest_marker('gpu'):
            item.add_marker(pytest.mark.skip(
                reason='no GPU that jax sees: these tests run a kernel on one'))
