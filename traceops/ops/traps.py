# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What differs between versions of jax, jax-triton, triton and ptxas, in one place."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from packaging.version import Version

from traceops.kernels.launch import KernelCall, kernel_function

__all__ = ['MIN_PTX', 'call_options', 'find_ptxas', 'kernel_name', 'output_order', 'problem',
           'ptx_of_cuda', 'ptx_version', 'register_dce_rule', 'triton_call', 'version']

#: The oldest PTX that can target a generation.
MIN_PTX = {80: 70, 86: 71, 89: 78, 90: 78, 100: 86, 103: 88, 120: 87}

#: The PTX that LLVM in triton emits at most; above it only the version line differs.
_SAFE_PTX = 88


def version(distribution: str) -> Version | None:
    """Of an installed distribution."""
    try:
        return Version(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return None


def problem(capability: int) -> str | None:
    """Why kernels cannot be compiled here for a device, or ``None``."""
    for package, distribution in (('triton', 'triton'), ('jax_triton', 'jax-triton')):
        if importlib.util.find_spec(package) is None:
            return (f"{distribution} is not installed: pip install 'braintrace-traceops[gpu]' "
                    'brings it')
    if capability == 0:
        return ('the compute capability of the device is not known: set '
                'TRACEOPS_COMPUTE_CAPABILITY, e.g. to 90')
    if capability < 80:
        return f'the kernels need compute capability 8.0, the device has {capability / 10}'
    have = ptx_version()
    need = max(v for c, v in MIN_PTX.items() if c <= max(capability, 80))
    if have is not None and have < need:
        return (f'the ptxas that will be used ({find_ptxas()}) knows PTX {have / 10}, and '
                f'compute capability {capability / 10} needs {need / 10}: put a newer CUDA '
                'toolkit first on PATH')
    jax_triton = version('jax-triton')
    if jax_triton is not None and jax_triton < Version('0.4') and have is not None:
        if have < _triton_ptx(capability):
            return (f'triton emits PTX {_triton_ptx(capability) / 10}, the ptxas that will be '
                    f'used ({find_ptxas()}) knows {have / 10}, and jax-triton {jax_triton} '
                    'cannot ask for less: pip install "jax-triton>=0.4"')
    return None


def find_ptxas() -> str | None:
    """The ptxas that jax-triton's compilation will find: PATH first, then jax's wheels."""
    found = shutil.which('ptxas')
    if found:
        return found
    spec = importlib.util.find_spec('nvidia')
    for root in (spec.submodule_search_locations or () if spec else ()):
        for place in ('cu13', 'cuda_nvcc'):
            path = pathlib.Path(root) / place / 'bin' / 'ptxas'
            if path.exists():
                return str(path)
    return None


def ptx_of_cuda(release: str) -> int:
    """The newest PTX that a CUDA release knows, as ten times its version.

    >>> ptx_of_cuda('12.9'), ptx_of_cuda('13.0')
    (88, 90)
    """
    major, minor = map(int, release.split('.'))
    if major == 12:                                     # 12.0 to 12.5: 8.0 to 8.5; 12.6 is 8.5
        return 80 + minor if minor < 6 else 79 + minor
    if major == 11:
        return 70 + minor
    return (major - 4) * 10 + minor


@functools.cache
def _release(path: str) -> str | None:
    try:
        text = subprocess.run([path, '--version'], capture_output=True, text=True,
                              timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r'release (\d+\.\d+)', text)
    return match[1] if match else None


def ptx_version() -> int | None:
    """The newest PTX that the ptxas in use knows, as ten times its version; None: not known."""
    path = find_ptxas()
    release = _release(path) if path else None
    return ptx_of_cuda(release) if release else None


def _triton_ptx(capability: int) -> int:
    """The PTX that triton emits when it is left to choose."""
    from triton.backends.nvidia import compiler
    tool = compiler.get_ptxas(capability)
    return compiler.ptx_get_version(tool.version)


def call_options(capability: int, jax_triton: Version | None = None,
                 have: int | None = None) -> dict[str, Any]:
    """Options of ``triton_call`` that every launch gets.

    FP fusion is named because triton 3.10 changes its default; the PTX version because triton
    emits that of its own ptxas, and another one will read it.
    """
    jax_triton = jax_triton or version('jax-triton')
    have = have or ptx_version()
    if jax_triton is not None and jax_triton < Version('0.4'):
        return {'enable_fp_fusion': True}
    # where nothing is known of the ptxas: the newest version that each supported jax brings
    ptx = min(have or _SAFE_PTX, _SAFE_PTX)
    ptx = max(ptx, max(v for c, v in MIN_PTX.items() if c <= max(capability, 80)))
    return {'backend_options': {'enable_fp_fusion': True, 'ptx_version': ptx}}


def register_dce_rule(jax_version: Version | None = None) -> bool:
    """jax-triton 0.4.1 on jax 0.12: its rule for dead code has the signature of jax 0.11."""
    jax_version = jax_version or version('jax')
    if jax_version is None or jax_version < Version('0.12'):
        return False
    from jax.interpreters import partial_eval
    from jax_triton import triton_lib
    primitive = triton_lib.triton_kernel_call_p
    rule = partial_eval.dce_rules.get(primitive)
    if rule is None or rule.__code__.co_argcount != 2:
        return False
    partial_eval.dce_rules[primitive] = _dce_rule
    return True


def _dce_rule(used: Any, live: Any, eqn: Any) -> Any:
    return [True] * len(eqn.invars), eqn


def kernel_name(call: KernelCall, jax_triton: Version) -> str:
    """Before jax-triton 0.4 an aliased output has a pointer of its own beside its operand's."""
    return call.kernel + ('_two_pointers' if call.aliases and jax_triton < Version('0.4') else '')


def triton_call(operands: Sequence[Any], structs: Sequence[Any], call: KernelCall,
                capability: int) -> Any:
    """``jax_triton.triton_call`` in the words of the version that is installed."""
    import jax_triton
    installed = version('jax-triton') or Version('0.4.1')
    os.environ.setdefault('TRITON_DEFAULT_FP_FUSION', '1')
    register_dce_rule()
    out = 'out_type' if installed >= Version('0.4') else 'out_shape'
    order = output_order(call, installed)
    with warnings.catch_warnings():
        # 0.4.1 would have aliased operands as Refs, which 0.3 does not have
        warnings.filterwarnings('ignore', 'input_output_aliases', DeprecationWarning)
        outputs = jax_triton.triton_call(
            *operands, *call.scalars, kernel=kernel_function(kernel_name(call, installed)),
            grid=call.grid, num_warps=call.tile.warps, num_stages=call.tile.stages,
            compute_capability=capability,
            input_output_aliases={i: order.index(o) for i, o in call.aliases.items()},
            **{out: [structs[o] for o in order]}, **call_options(capability), **call.constants)
    return [outputs[order.index(o)] for o in range(len(structs))]


def output_order(call: KernelCall, jax_triton: Version) -> list[int]:
    """The order in which jax-triton is to be given the outputs.

    Since 0.4 an aliased output has no pointer of its own in the kernel, but it keeps its place
    among the results, which the launch hands to the pointers one by one: of the outputs that
    follow an aliased one, each pointer would get the buffer before its own. So those come last.
    """
    outputs = range(len(call.outputs))
    if jax_triton < Version('0.4'):
        return list(outputs)
    return sorted(outputs, key=lambda o: o in call.aliases.values())
