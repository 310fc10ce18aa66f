# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
import functools
import gc
import itertools
import os

import brainstate
import jax
import jax._src.compiler
import pytest
import saiunit as u

import traceops

# Most of the time here is tracing: objects by the million, none of them garbage while it lasts,
# and the line that every operation is from.
gc.set_threshold(200_000, 20, 100)
jax.config.update('jax_traceback_in_locations_limit', 0)


@pytest.fixture(scope='session', autouse=True)
def compiled_once(tmp_path_factory):
    """What one worker compiled, the others have, as long as the tests last."""
    mine = tmp_path_factory.getbasetemp()
    ours = mine.parent if 'PYTEST_XDIST_WORKER' in os.environ else mine
    jax.config.update('jax_compilation_cache_dir', str(ours / 'programs'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
    yield


@pytest.fixture(autouse=True)
def clean():
    """Every test starts and ends with traceops not installed and nothing configured."""
    brainstate.environ.set(dt=1. * u.ms)
    yield
    traceops.uninstall()
    traceops.reset()


_options_of = jax._src.compiler.get_compile_options


@functools.cache
def _quickly():
    """Compiler options that take the shorter way from an operation to machine code."""
    options = {'xla_cpu_use_fusion_emitters': False}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:      # later versions of XLA have one way only
        return {}
    return options


@pytest.fixture
def float64(monkeypatch):
    """Double precision for one test, compiled without XLA's slow optimisations.

    Those tests compare numbers, and most of their time is compiling; the ones in single precision
    run as users do.
    """
    def options_of(*args, env_options_overrides=None, **kwargs):
        return _options_of(*args, **kwargs, env_options_overrides={
            **_quickly(), **(env_options_overrides or {})})

    brainstate.environ.set(precision=64)
    jax.config.update('jax_enable_x64', True)
    jax.config.update('jax_disable_most_optimizations', True)
    _quickly()
    monkeypatch.setattr(jax._src.compiler, 'get_compile_options', options_of)
    yield
    brainstate.environ.set(precision=32)
    jax.config.update('jax_enable_x64', False)
    jax.config.update('jax_disable_most_optimizations', False)


_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs():
    """jax keeps what it compiled for ever: without this a worker grows to gigabytes."""
    yield
    if next(_tests) % 10 == 0:
        jax.clear_caches()


def pytest_collection_modifyitems(items):
    if any(d.platform == 'gpu' for d in jax.devices()):
        return
    for item in items:
        if item.get_closest_marker('gpu'):
            item.add_marker(pytest.mark.skip(
                reason='no GPU that jax sees: these tests run a kernel on one'))
