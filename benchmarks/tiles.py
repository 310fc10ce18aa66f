# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""``traceops bench --tiles``: every operation with other entries in its launch table, on a GPU.

A tile that gives a wrong result, or does not compile, is said and not timed. What is printed is
for whoever writes ``kernels/<operation>/launch.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
from collections.abc import Iterator

import jax
from rich.table import Table
from tqdm import tqdm

from traceops.benchmarks.device_time import microseconds
from traceops.benchmarks.measure import check
from traceops.benchmarks.operations import OperationCase, cases
from traceops.kernels.launch import Tile, generation
from traceops.ops import choice
from traceops.text import render

__all__ = ['CANDIDATES', 'Found', 'run', 'table']


def _tiles(blocks: Iterator[tuple[int, ...]] | list[tuple[int, ...]],
           forms: list[tuple[int, int]]) -> list[Tile]:
    return [Tile(block, warps, stages) for block, (warps, stages) in
            itertools.product(blocks, forms)]


_WALK = _tiles([(32, 16), (32, 32), (32, 64), (32, 96)], [(1, 2)]) + _tiles(
    [(64, 32), (64, 64)], [(2, 2)]) + _tiles([(128, 64)], [(4, 2)])
#: What is tried of every operation; what a block is, its launch table says.
CANDIDATES: dict[str, list[Tile]] = {
    'adjoint_window': _WALK,
    'es_trace_window': _WALK,
    'd_trace_window': [
        *_tiles([(32, 64, 0), (16, 64, 0), (16, 128, 0), (8, 128, 0), (32, 32, 0)], [(4, 2)]),
        *_tiles([(64, 64, 0), (32, 128, 0), (128, 64, 16)], [(8, 2)]),
        *_tiles([(64, 64, 16), (64, 32, 16), (32, 64, 16), (64, 64, 32)], [(4, 2), (4, 3)])],
    'sparse_trace_gradient': _tiles([(4, 128), (8, 128), (8, 256), (16, 128), (16, 64)], [(4, 2)]),
    'trace_gradient': [
        *_tiles([(128, 64, 32), (64, 64, 32), (64, 64, 64)], [(4, 3), (8, 3)]),
        *_tiles([(128, 32, 32), (64, 32, 32), (64, 32, 64), (128, 64, 16)], [(4, 3), (4, 4)]),
        *_tiles([(256, 64, 32), (128, 128, 32)], [(8, 3)])],
}


@dataclasses.dataclass(frozen=True)
class Found:
    """Of one case with one tile: microseconds, or what was wrong with it."""

    name: str
    tile: Tile
    microseconds: float | None
    problem: str = ''


def run(names: str = '', repeats: int = 10, N: int = 1024) -> list[Found]:
    """Try the candidates for the cases of :mod:`traceops.benchmarks.operations`.

    Parameters
    ----------
    names : str
        Part of the name of the cases that are wanted.
    repeats, N : int
        Calls that are timed, and neurons of the layer.
    """
    wanted = [(case, tile) for case in cases(N=N) if names in case.name
              for tile in CANDIDATES[case.operation]]
    return [_tried(case, tile, repeats) for case, tile in tqdm(wanted, leave=False)]


@contextlib.contextmanager
def _tabled(operation: str, tile: Tile) -> Iterator[None]:
    """With ``tile`` in every entry for the GPU of this machine."""
    entries = importlib.import_module(f'traceops.kernels.{operation}.launch').TABLE
    kept = dict(entries)
    here = generation(choice.cuda_place().capability)
    entries.update({key: tile for key in entries if key[0] == here})
    try:
        yield
    finally:
        entries.update(kept)


def _tried(case: OperationCase, tile: Tile, repeats: int) -> Found:
    operands = tuple(map(jax.device_put, case.operands))
    want = jax.jit(functools.partial(case.call, backend='jax'))(*operands)
    with _tabled(case.operation, tile):
        fn = jax.jit(functools.partial(case.call, backend='triton'))
        try:
            got = jax.block_until_ready(fn(*operands))
        except Exception as err:                # too much shared memory, for example
            return Found(case.name, tile, None, (str(err).splitlines() or [''])[0][:60])
    difference = check(want, got)
    if not difference <= case.tolerance:
        return Found(case.name, tile, None, f'wrong by {difference:.1e}')
    return Found(case.name, tile, microseconds(fn, operands, repeats, not case.in_place))


def table(found: list[Found]) -> str:
    """The quickest tiles of every case first."""
    out = Table(title=f'tiles on {jax.devices()[0].device_kind}', title_justify='left')
    for name in ('case', 'us', 'block', 'warps', 'stages', 'problem'):
        out.add_column(name, overflow='fold')
    for _, group in itertools.groupby(found, key=lambda f: f.name):
        for f in sorted(group, key=lambda f: f.microseconds or float('inf')):
            out.add_row(f.name, f'{f.microseconds:.1f}' if f.microseconds else '-',
                        ' x '.join(map(str, f.tile.block)), str(f.tile.warps), str(f.tile.stages),
                        f.problem)
    return render(out, width=120)
