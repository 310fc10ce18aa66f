# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What a GPU records of its kernels, read; launch tables tried on it, and put back."""

import types

import jax
import jax.numpy as jnp
import pytest

from traceops import benchmarks, ops
from traceops.benchmarks import device_time, tiles
from traceops.benchmarks.operations import cases
from traceops.kernels.adjoint_window.launch import TABLE
from traceops.kernels.launch import Tile
from traceops.ops import choice


def plane(name, **lines):
    return types.SimpleNamespace(name=name, lines=[
        types.SimpleNamespace(name=line, events=[
            types.SimpleNamespace(name=n, start_ns=at, duration_ns=ns) for n, at, ns in events])
        for line, events in lines.items()])


@pytest.fixture
def record(monkeypatch):
    """Gives the planes that the profiler is to have recorded."""
    def give(*planes):
        monkeypatch.setattr(jax.profiler.ProfileData, 'from_file',
                            lambda path: types.SimpleNamespace(planes=planes))
    return give


def test_kernels_of_all_streams_in_order(record):
    record(plane('/host:CPU', Stream=[('not ours', 0, 9)]),
           plane('/device:GPU:0', **{'Stream #1(Compute)': [('late', 30, 2000), ('first', 10, 500)],
                                     'Stream #2(MemcpyD2D)': [('MemcpyD2D', 20, 1000)],
                                     'XLA Ops': [('whole', 10, 9000)]}))
    names, seconds = zip(*device_time.kernel_seconds(jax.jit(jnp.sin), 1.), strict=True)
    assert names == ('first', 'MemcpyD2D', 'late')
    assert seconds == pytest.approx((5e-7, 1e-6, 2e-6))


def test_no_gpu_no_record(monkeypatch):
    monkeypatch.setattr(device_time, '_FILL', 2)
    assert device_time.kernel_seconds(jax.jit(jnp.sin), 1.) == []
    assert device_time.microseconds(jax.jit(jnp.sin), (1.,), 2) is None


def test_the_median_call_without_what_lies_between(monkeypatch):
    calls = [('tan', 9.), ('k', 1e-6), ('Memcpy', 5e-6), ('tan', 9.), ('tan', 9.), ('k', 3e-6),
             ('sum', 1e-6), ('tan', 9.), ('k', 2e-6)]
    monkeypatch.setattr(device_time, 'kernel_seconds',
                        lambda fn, *args: [('tan', 9.)] if args else calls)
    monkeypatch.setattr(device_time, '_FILL', 2)
    assert device_time.microseconds(jax.jit(jnp.sin), (1.,), 3) == pytest.approx(4.)
    assert device_time.microseconds(jax.jit(jnp.sin), (1.,), 3, copies=False) == pytest.approx(2.)


@pytest.fixture
def tried(monkeypatch):
    """``tried(what the kernel makes of the result)``: one case with one tile, as if on an H200."""
    case = next(c for c in cases(3, 2, 5) if c.name == 'adjoint_window S=1')
    monkeypatch.setattr(choice, 'cuda_place', lambda: choice.Place('cuda', 90))
    monkeypatch.setattr(tiles, 'microseconds', lambda *args: 7.)
    seen = []

    def call(kernel):
        def either(L, D, f, backend):
            if backend == 'triton':
                seen.append(TABLE[90, 'float32', 1])
                return kernel(ops.adjoint_window(L, D, [f], backend='jax'))
            return ops.adjoint_window(L, D, [f], backend='jax')
        tile = Tile((64, 2), 2)
        before = dict(TABLE)
        found = tiles._tried(tiles.dataclasses.replace(case, call=either), tile, 1)
        assert before == TABLE and seen == [tile]
        return found
    return call


def test_a_tile_is_in_the_table_while_it_is_tried(tried):
    found = tried(lambda result: result)
    assert found.microseconds == 7. and not found.problem
    assert '64 x 2' in tiles.table([found])


def test_a_wrong_tile_is_not_timed(tried):
    found = tried(lambda result: jax.tree.map(lambda a: 1.01 * a, result))
    assert found.microseconds is None and 'wrong by' in found.problem


def test_a_tile_that_does_not_compile_is_said(tried):
    def fails(result):
        raise RuntimeError('out of resource: shared memory')
    found = tried(fails)
    assert found.microseconds is None and 'shared memory' in found.problem


def test_every_operation_has_candidates():
    """But the one whose kernels are written for a step: it has no table of tiles."""
    assert {case.operation for case in cases(2, 1, 3)} == {*tiles.CANDIDATES, 'simulate_window'}


def test_without_a_gpu_it_says_so(capsys):
    assert benchmarks.main(['--tiles']) == 2
    assert 'jax runs on cpu' in capsys.readouterr().err
