"""MallocArena: the memory of activations stays with the process from one layer to the next.

glibc's malloc returns large freed blocks to the system and requests them again for the next layer. The kernel must then
clear each page again, and a hypervisor may have to find it again: up to a seventh of a prompt's step (docs/log.md).
`mallopt` tells malloc to keep the blocks. Other allocators are left as they are.
"""

import ctypes
from collections.abc import Callable

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MAX_INT = 2**31 - 1
_PIECE_BYTES = 1 << 20

_libc = ctypes.CDLL(None)


class MallocArena:
    """Memory for activations inside malloc's arena, reserved as one block before anything else can split it."""

    def __init__(self, num_kept: int, num_bytes: int) -> None:
        """Reserve `num_bytes`, the size of a step's activations, until `free`. From now on malloc keeps up to
        `num_kept` free bytes instead of returning them to the system."""
        self._block = 0
        self._num_bytes = num_bytes
        if not hasattr(_libc, "mallopt"):
            return
        _libc.mallopt(_M_MMAP_MAX, 0)
        _libc.mallopt(_M_TRIM_THRESHOLD, min(num_kept, _MAX_INT))
        _libc.malloc.restype = ctypes.c_void_p
        self._block = _libc.malloc(ctypes.c_size_t(num_bytes)) or 0

    def take_pages(self, stopped: Callable[[], bool]) -> None:
        """Write to every page of the block, until its end or until `stopped()`. `free` must come after it."""
        for begin in range(0, self._num_bytes if self._block else 0, _PIECE_BYTES):
            if stopped():
                return
            ctypes.memset(self._block + begin, 0, min(_PIECE_BYTES, self._num_bytes - begin))

    def free(self) -> None:
        """Hand the reserved block to malloc, which allocates activations from it. Safe to repeat."""
        block, self._block = self._block, 0
        _libc.free(ctypes.c_void_p(block))


def release() -> None:
    """Return malloc's free memory to the system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
