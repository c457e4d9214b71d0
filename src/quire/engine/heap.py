"""Heap: memory of activations stays with the process from one layer to the next.

glibc's malloc gives large blocks back to the system as they are freed and asks for them again at the next layer, where
each page must be cleared anew, and under a hypervisor perhaps be found anew: up to a seventh of a prompt's step
(docs/log.md). Here it is told to keep them. With another malloc nothing changes.
"""

import ctypes
from collections.abc import Callable

# Of mallopt; see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MOST = 2**31 - 1
_PIECE_BYTES = 1 << 20

_libc = ctypes.CDLL(None)


class Heap:
    """Room for activations inside malloc's memory, which nobody else has divided before."""

    def __init__(self, num_kept: int, num_bytes: int) -> None:
        """`num_kept` bytes are not given back when they are free; `num_bytes`, what a step takes, are put aside until
        `open`, and can be taken from the system meanwhile."""
        self._block = 0
        self._num_bytes = num_bytes
        if not hasattr(_libc, "mallopt"):
            return
        _libc.mallopt(_M_MMAP_MAX, 0)
        _libc.mallopt(_M_TRIM_THRESHOLD, min(num_kept, _MOST))
        _libc.malloc.restype = ctypes.c_void_p
        self._block = _libc.malloc(ctypes.c_size_t(num_bytes)) or 0

    def take_pages(self, stopped: Callable[[], bool]) -> None:
        """Write to the memory put aside until it ends or `stopped` says so. Another thread may call `open` after."""
        for begin in range(0, self._num_bytes if self._block else 0, _PIECE_BYTES):
            if stopped():
                return
            ctypes.memset(self._block + begin, 0, min(_PIECE_BYTES, self._num_bytes - begin))

    def open(self) -> None:
        """Let malloc give out what was put aside."""
        block, self._block = self._block, 0
        _libc.free(ctypes.c_void_p(block))


def give_back() -> None:
    """Return to the system what is free."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
