# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Every kernel and entry of the launch tables, compiled: what it uses, and that it is no worse."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from tests.gpufree import resources
from traceops.kernels.adjoint_window import launch as adjoint_launch
from traceops.kernels.d_trace_window import launch as d_launch
from traceops.kernels.es_trace_window import launch as es_launch
from traceops.kernels.simulate_window import launch
from traceops.kernels.sparse_trace_gradient import launch as sparse_launch
from traceops.kernels.trace_gradient import launch as product_launch


@pytest.fixture(scope='module')
def recorded():
    return resources.read_table()


@pytest.mark.parametrize('case', [          # quickly: every third of a generation, so all tiles
    pytest.param(case, id=case.name.replace(' ', '-'),
                 marks=[] if case.generation == 90 and i % 3 == 2 else pytest.mark.slow)
    for i, case in enumerate(resources.CASES)])
def test_resources(case, recorded, proof):
    compiled, tile = resources.compile_case(case), case.call()[1].tile
    found = resources.measured(compiled)
    assert found.stack == 0 and found.local == 0, 'registers are spilled'
    assert found.shared <= resources.SHARED[case.generation][1], 'a block may not ask for that'
    fit = resources.blocks_per_sm(found, tile.warps, case.generation)
    assert fit >= tile.blocks_per_sm, 'the launch table claims more programs a multiprocessor'
    if case.operation == 'd_trace_window':
        (*_, S), dtype = case.shapes[0]
        of_a_thread = math.prod(tile.block[:2]) * S * np.dtype(dtype).itemsize // (32 * tile.warps)
        if case.call()[1].constants['PACKED']:
            assert found.wide >= 2 * (of_a_thread // 16), 'narrow accesses of the trace'
        assert (found.tensor > 0) == ('many' in case.form)
    if case.operation == 'trace_gradient':
        assert found.tensor > 0, 'no instruction of tensor cores'
        assert found.wide > 0 and not found.narrow, 'narrow accesses'
    if case.operation == 'simulate_window':
        check_rows(case, compiled)
        check_order(case, compiled)
    proof(case.name, f'{found.registers} registers, {found.shared} B shared',
          f'{found.wide} wide, {found.narrow} narrow accesses, {fit} programs fit, '
          f'{tile.blocks_per_sm} claimed')
    before = recorded[case.name]
    worse = [f'{name}: {getattr(found, name)}, recorded {getattr(before, name)}'
             for name in (field.name for field in dataclasses.fields(found))
             if (getattr(found, name) < getattr(before, name) if name == 'wide'
                 else getattr(found, name) > getattr(before, name))]
    assert not worse, worse


def check_rows(case, compiled):
    """Rows of the weights are loaded with nothing to wait for between two of them."""
    loops = [loop for loop in resources.innermost_loops(compiled)
             if any(k.startswith('LDG') for k in loop)]
    made_of = launch.kernel_of(dict(case.params)['step'])[1]
    assert len(loops) == len(made_of.exchanges)
    for loop, exchange in zip(loops, made_of.exchanges, strict=True):
        assert not any(k.startswith('BAR') for k in loop), 'a barrier for every few rows'
        wide = sum(k.startswith('LDG') and '128' in k.split('.') for k in loop)
        assert wide >= (8 if exchange.events else 4), 'narrow accesses, or few under way'


#: Barriers of a step, at most: one for each list or row that is sent; others are of layouts.
BARRIERS = {'lif 128': 3, 'lif 1024': 8, 'lif 2048': 8, 'alif 1024': 8, 'gru 128': 20}


def check_order(case, compiled):
    """What a step sends is stored, then there is a barrier, then it is read; and few barriers."""
    step, inside = next(loop for loop in resources.nested_loops(compiled) if len(loop[1]) > 0
                        and any(k.startswith('LDG') for k in loop[1][0][1]))
    assert sum(k.startswith('BAR') for k in step) <= BARRIERS[case.form]
    for place, _ in inside:
        last = {kind: max(i for i, k in enumerate(step[:place]) if k.startswith(kind))
                for kind in ('STG', 'BAR')}
        assert last['STG'] < last['BAR'], 'what is sent is read with no barrier after its store'


def test_every_entry_of_the_tables_is_tried():
    """And nothing is recorded that is no longer tried."""
    used = {(case.operation, case.generation, case.call()[1].tile) for case in resources.CASES}
    for operation, table in (('adjoint_window', adjoint_launch.TABLE), (
            'es_trace_window', es_launch.TABLE), ('d_trace_window', d_launch.TABLE), (
            'trace_gradient', product_launch.TABLE), (
            'sparse_trace_gradient', sparse_launch.TABLE)):
        assert {(operation, key[0], tile) for key, tile in table.items()} <= used
    assert {case.name for case in resources.CASES} == set(resources.read_table())


def test_a_kernel_that_spills_is_seen(monkeypatch):
    """The measure can fail: a tile too large for the registers of one warp."""
    case = next(c for c in resources.CASES if c.operation == 'd_trace_window' and 'S=4' in c.form)
    monkeypatch.setitem(d_launch.TABLE, (case.generation, 'float32', 4, False),
                        d_launch.Tile((64, 64, 0), warps=1))
    found = resources.measure(case)
    assert found.stack > 0 and found.local > 0


def test_registers_and_shared_memory_bound_the_programs_on_a_multiprocessor():
    r = resources.Resources(64, 0, 0, 0, 0, 0, 0, 0)
    assert resources.blocks_per_sm(r, 4, 90) == 8
    assert resources.blocks_per_sm(dataclasses.replace(r, registers=65), 4, 90) == 7
    assert resources.blocks_per_sm(dataclasses.replace(r, shared=100_000), 4, 90) == 2
    assert resources.blocks_per_sm(dataclasses.replace(r, registers=16), 1, 90) == 32


def test_names_are_unique():
    names = [case.name for case in resources.CASES]
    assert not [a for a, b in itertools.pairwise(sorted(names)) if a == b]
