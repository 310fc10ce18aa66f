# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Compiling JAX programs for NVIDIA GPUs that are not there.

XLA's GPU compiler needs a description of the device, not the device. ``make test-gpufree`` makes
an environment that has it (jax's CUDA plugin without the CUDA wheels).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

__all__ = ['GPUS', 'Gpu', 'collectives', 'compile_for', 'kernel_calls', 'mesh_of', 'topology']


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA wants to know of a device; sizes in bytes, bandwidth in bytes a second."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    fp32_units: int             # of a multiprocessor
    shared_memory: int          # of a multiprocessor
    shared_memory_of_block: int     # that a block may ask for
    bandwidth: int
    cache: int
    memory: int
    gigahertz: float
    tensor_bf16: float          # dense operations a second
    tensor_tf32: float

    @property
    def peaks(self) -> dict[str, float]:
        """Operations a second by what they are done in."""
        fp32 = 2e9 * self.multiprocessors * self.fp32_units * self.gigahertz
        return {'bf16': self.tensor_bf16, 'tf32': self.tensor_tf32, 'fp32': fp32}

    def description(self) -> str:
        """In the text form of XLA's ``GpuTargetConfigProto``."""
        major, minor = self.capability
        return '\n'.join([
            'gpu_device_info {', *(f'  {key}: {value}' for key, value in {
                'threads_per_block_limit': 1024, 'threads_per_warp': 32,
                'threads_per_core_limit': 2048, 'shared_memory_per_block': 48 * 2 ** 10,
                'shared_memory_per_core': self.shared_memory,
                'shared_memory_per_block_optin': self.shared_memory_of_block,
                'core_count': self.multiprocessors, 'fpus_per_core': self.fp32_units,
                'block_dim_limit_x': 2 ** 31 - 1, 'block_dim_limit_y': 2 ** 16 - 1,
                'block_dim_limit_z': 2 ** 16 - 1, 'memory_bandwidth': self.bandwidth,
                'l2_cache_size': self.cache, 'clock_rate_ghz': self.gigahertz,
                'device_memory_size': self.memory, 'registers_per_core_limit': 2 ** 16,
                'registers_per_block_limit': 2 ** 16}.items()),
            f'  cuda_compute_capability {{ major: {major} minor: {minor} }}', '}',
            'platform_name: "CUDA"', 'dnn_version_info { major: 9 minor: 8 }',
            f'device_description_str: "{self.name}"'])


#: From the vendor's data sheets and what the devices report.
GPUS = {
    'a100': Gpu('NVIDIA A100-SXM4-80GB', (8, 0), 108, 64, 167936, 166912, 2039 * 10 ** 9,
                40 * 2 ** 20, 84987740160, 1.41, 312e12, 156e12),
    'h100': Gpu('NVIDIA H100 80GB HBM3', (9, 0), 132, 128, 233472, 232448, 335232 * 10 ** 7,
                50 * 2 ** 20, 84929347584, 1.98, 989e12, 495e12),
    'h200': Gpu('NVIDIA H200', (9, 0), 132, 128, 233472, 232448, 4800 * 10 ** 9, 60 * 2 ** 20,
                150754820096, 1.98, 989e12, 495e12),
    'b200': Gpu('NVIDIA B200', (10, 0), 148, 128, 233472, 232448, 8 * 10 ** 12,
                126 * 2 ** 20 + 524288, 191512968192, 1.965, 2250e12, 1100e12),
}


def topology(gpu: str, devices: int = 1) -> Any:
    """One process with this many devices of a kind in :data:`GPUS`."""
    if gpu not in GPUS:
        raise ValueError(f'gpu={gpu!r} is not described; there are {", ".join(map(repr, GPUS))}.')
    return topologies.get_topology_desc(
        '', platform='cuda', target_config=GPUS[gpu].description(), topology=f'1x1x{devices}')


def mesh_of(gpu: str, **axes: int) -> Mesh:
    """A mesh of absent devices, e.g. ``mesh_of('h100', batch=2, out=4)``."""
    devices = topology(gpu, math.prod(axes.values())).devices
    return Mesh(np.array(devices).reshape(tuple(axes.values())), tuple(axes))


def compile_for(gpu: str, fn: Callable[..., Any], *structs: Any, mesh: Mesh | None = None,
                specs: Sequence[Any] = (), **options: Any) -> Any:
    """The program of ``fn`` for a GPU that need not be there.

    Parameters
    ----------
    gpu : str
        A key of :data:`GPUS`.
    fn : callable
    *structs : pytree of jax.ShapeDtypeStruct
        Its arguments.
    mesh : Mesh, optional
        Of :func:`mesh_of`; without it, one device.
    specs : sequence of PartitionSpec
        With a mesh: how each argument lies on it, or a pytree of them, one an array.
    **options
        Of ``jax.jit``.

    Returns
    -------
    jax.stages.Compiled
        To read (``as_text``, ``memory_analysis``), not to run.
    """
    if mesh is None:
        one = SingleDeviceSharding(topology(gpu).devices[0])
        places: Any = jax.tree.map(lambda _: one, structs)
    else:
        spread = jax.tree.broadcast(tuple(specs) or PartitionSpec(), structs)
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), spread)
    given = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
                         structs, places)
    # XLA has no cost table for compute capability 8.0
    model = {} if gpu == 'a100' else {'xla_gpu_collect_cost_model_stats': True}
    return jax.jit(fn, **options).lower(*given).compile(compiler_options=model)


def kernel_calls(compiled: Any, operation: str = '') -> list[str]:
    """The lines of a compiled program that call a Triton kernel of ours (of one operation)."""
    return [line.strip() for line in compiled.as_text().splitlines()
            if 'custom-call(' in line and 'triton_kernel_call' in line and operation in line]


def collectives(compiled: Any) -> dict[str, int]:
    """How many of each kind of communication a compiled program has."""
    text = compiled.as_text()
    kinds = ('all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute', 'all-to-all')
    found = {kind: len(re.findall(rf'\b{kind}(?:-start)?\(', text)) for kind in kinds}
    return {kind: count for kind, count in found.items() if count}
