"""StepRecord: what the engine process is doing, in memory that it shares with the process that answers clients.

The engine writes it, the other process reads it: while the engine lives, to see that it advances; after its death, to
see which requests were in the step that died. A message could not say that: it would be written before the death and
perhaps never read.
"""

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Iterable

NUM_BYTES = 1 << 20
"""Room for the ids of 65,536 requests."""
_IDLE, _ALL, _LISTED = 0, 1, 2
_STATE = struct.Struct("=Q")
_COUNTS = struct.Struct("=QQd")
_LENGTH = struct.Struct("=Q")
_COUNTS_AT = _STATE.size
_LENGTH_AT = _COUNTS_AT + _COUNTS.size
_IDS_AT = _LENGTH_AT + _LENGTH.size
_DECAY = 0.999
"""The longest step is forgotten slowly: after some thousand steps it no longer counts."""


class StepRecord:
    """One engine process writes it, by `begin`, `compute` and `end`. `fd` is inherited by that process."""

    def __init__(self, fd: int | None = None) -> None:
        """A new record, or the one behind an inherited descriptor."""
        self.fd = _shared_memory() if fd is None else fd
        self._memory = mmap.mmap(self.fd, NUM_BYTES)
        self._batch_id = 0
        self._began = 0.0
        self._beat, self._num_handled, self._longest = 0, 0, 0.0

    def close(self) -> None:
        """Release the memory. Nothing is read or written afterwards. Safe to repeat."""
        if not self._memory.closed:
            self._memory.close()
            os.close(self.fd)

    # -- written by the engine process --------------------------------------------------------------------------------

    def begin(self) -> None:
        """The engine begins to plan a step: from now on any request that it holds may be at fault."""
        self._began = time.monotonic()
        _STATE.pack_into(self._memory, 0, _ALL)
        self._advance()

    def compute(self, request_ids: Iterable[str], batch_id: int = 0) -> None:
        """The engine computes these requests. A `batch_id` other than 0 that comes again stands for the same ones; then
        they are not read."""
        if not batch_id or batch_id != self._batch_id:
            self._batch_id = 0
            _STATE.pack_into(self._memory, 0, _ALL)
            text = "\n".join(dict.fromkeys(request_ids)).encode()
            if len(text) > NUM_BYTES - _IDS_AT:
                return
            _LENGTH.pack_into(self._memory, _LENGTH_AT, len(text))
            self._memory[_IDS_AT : _IDS_AT + len(text)] = text
            self._batch_id = batch_id
        _STATE.pack_into(self._memory, 0, _LISTED)

    def end(self, *, num_messages: int) -> None:
        """The step has ended and its results are sent. `num_messages` messages were carried out before it."""
        _STATE.pack_into(self._memory, 0, _IDLE)
        self._longest = max(self._longest * _DECAY, time.monotonic() - self._began)
        self._num_handled += num_messages
        self._advance()

    def _advance(self) -> None:
        self._beat += 1
        _COUNTS.pack_into(self._memory, _COUNTS_AT, self._beat, self._num_handled, self._longest)

    # -- read by the process that answers clients ---------------------------------------------------------------------

    @property
    def beat(self) -> int:
        """A number that changes as long as the engine advances."""
        return int(_COUNTS.unpack_from(self._memory, _COUNTS_AT)[0])

    @property
    def num_handled(self) -> int:
        """Messages that the engine has carried out."""
        return int(_COUNTS.unpack_from(self._memory, _COUNTS_AT)[1])

    @property
    def longest_step(self) -> float:
        """Seconds of the longest recent step."""
        return float(_COUNTS.unpack_from(self._memory, _COUNTS_AT)[2])

    @property
    def in_step(self) -> bool:
        """Whether the engine is, or died, in a step."""
        return bool(_STATE.unpack_from(self._memory, 0)[0] != _IDLE)

    def suspects(self) -> frozenset[str] | None:
        """Requests that were in the step at a death: none between two steps, None for all that the engine held."""
        (state,) = _STATE.unpack_from(self._memory, 0)
        if state != _LISTED:
            return None if state == _ALL else frozenset()
        (length,) = _LENGTH.unpack_from(self._memory, _LENGTH_AT)
        text = self._memory[_IDS_AT : _IDS_AT + length].decode()
        return frozenset(text.split("\n")) if text else frozenset()


def _shared_memory() -> int:
    """A descriptor of `NUM_BYTES` zeroed bytes without a name."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("quire-step-record")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, NUM_BYTES)
    return fd
