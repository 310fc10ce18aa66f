# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The fixtures of all tests; ``conftest.py`` registers them where tests are run."""

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
    """What one process compiled, the others have, as long as the tests last."""
    mine = tmp_path_factory.getbasetemp()
    ours = mine.parent if 'PYTEST_XDIST_WORKER' in os.environ else mine
    for name, value in {'jax_compilation_cache_dir': str(ours / 'programs'),
                        'jax_persistent_cache_min_compile_time_secs': 0.,
                        'jax_persistent_cache_min_entry_size_bytes': -1}.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)   # of processes that tests start
    yield
    # a program that still waits for a Python callback when the interpreter ends would never end
    jax.effects_barrier()
    jax.block_until_ready(jax.live_arrays())


@pytest.fixture(scope='session', autouse=True)
def full_float32():
    """On a GPU too, where jax multiplies in tf32 unless it is told otherwise."""
    if jax.default_backend() == 'gpu':
        jax.config.update('jax_default_matmul_precision', 'highest')


@pytest.fixture(autouse=True)
def clean():
    """Every test starts and ends with traceops not installed and nothing configured."""
    brainstate.environ.set(dt=1. * u.ms)
    yield
    traceops.uninstall()
    traceops.reset()


@functools.cache
def _short_way():
    """Options of XLA for the shorter of its ways from an operation to machine code."""
    options = {'xla_cpu_use_fusion_emitters': False}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:      # a later XLA: it has one way
        return {}
    return options


@pytest.fixture(scope='session', autouse=True)
def single_operations_compiled_quickly():
    """What runs outside jit is a program an operation and shape, hundreds in all."""
    compile_, short = jax._src.compiler.compile_or_get_cached, _short_way()
    cpu = jax.default_backend() == 'cpu'

    def quick_compile(backend, computation, devices, options, *args, **kwargs):
        functions = list(computation.body.operations)
        if cpu and len(functions) == 1 and len(list(functions[0].entry_block.operations)) <= 10:
            build = options.executable_build_options.debug_options
            build.xla_backend_optimization_level = 0
            build.xla_llvm_disable_expensive_passes = True
            options.env_option_overrides = [
                *options.env_option_overrides, *short.items()]
        return compile_(backend, computation, devices, options, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax._src.compiler, 'compile_or_get_cached', quick_compile)
        yield


@pytest.fixture
def compiled_quickly(monkeypatch):
    """Without XLA's slow optimisations: of tests that compare numbers, most time is compiling.

    A GPU, where there is one, is given its programs as users have them.
    """
    if jax.default_backend() != 'cpu':
        yield
        return
    short = _short_way()
    if short:       # what jax.jit takes as compiler_options, for all that is compiled
        options_of = jax._src.compiler.get_compile_options

        def quick_options(*args, env_options_overrides=None, **kwargs):
            return options_of(*args, **kwargs,
                              env_options_overrides={**short, **(env_options_overrides or {})})
        monkeypatch.setattr(jax._src.compiler, 'get_compile_options', quick_options)
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def float64(compiled_quickly):
    """Double precision for one test; those in single precision run as users do."""
    brainstate.environ.set(precision=64)
    jax.config.update('jax_enable_x64', True)
    yield
    brainstate.environ.set(precision=32)
    jax.config.update('jax_enable_x64', False)


_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs():
    """jax keeps what it compiled for ever: without this a worker grows to gigabytes."""
    yield
    if next(_tests) % 60 == 0:
        jax.clear_caches()
