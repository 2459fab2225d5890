"""How this process's C library keeps memory that programs on the CPU take and give back at every step."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

# Of mallopt(3): (parameter, value). Blocks of any size come from one heap, which keeps what is freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_SETTINGS = ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_MMAP_THRESHOLD, 2**30), (_M_ARENA_MAX, 1))


def keep_freed_memory() -> None:
    """Freed memory stays with the process, up to 2 GiB; nothing where the C library is not glibc, or the environment says otherwise.

    XLA takes a step's temporaries from malloc and gives them back behind it, and glibc hands large blocks back to the system, which zeroes
    each page when it is touched again: a quarter to a third of the time of a small model's step. To be called before threads start,
    which get heaps of their own else, and again behind the first rows that TensorFlow reads from Python (2.21 has glibc give
    back blocks of 128 KiB from then on).
    """
    is_set = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if is_set or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in _SETTINGS:
        if not mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) was refused by {platform.libc_ver()}")
