# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory that is given back to the system and touched anew: what of it can be kept (glibc).

Large arrays are mapped by themselves, unmapped when they are freed, and cost a page fault for each
4 KiB when the next call allocates them. Run as a program, this module counts those faults.
"""

from __future__ import annotations

import ctypes
import platform

__all__ = ['able', 'faults', 'reuse']

# of mallopt(3): how many blocks are mapped by themselves, at how much free memory the end of the
# heap is given back, how many heaps there are (what one has freed is of no use to another)
_OPTIONS = {-4: 0, -1: -1, -8: 1}


def able() -> bool:
    """Whether the allocator of this process is glibc's, as far as Python can tell."""
    return platform.libc_ver()[0] == 'glibc'


def reuse() -> None:
    """Have this process keep what it frees, from now on and until it ends."""
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in _OPTIONS.items():
        mallopt(option, value)


def faults(size: int = 2 ** 26, calls: int = 4) -> float:
    """Page faults a call that allocates a block of ``size`` bytes, fills it, and frees it."""
    import resource  # not on Windows
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p

    def call() -> None:
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
        ctypes.memset(block, 1, size)
        libc.free(block)

    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


if __name__ == '__main__':
    without = faults()
    reuse()
    print(f'{without:.0f} {faults():.0f}')
