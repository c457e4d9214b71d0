"""BlockStore: the contents of the tiers below the pool, and the copies between them and the pool.

Host memory is one tensor of blocks, copied to and from within a step. It is trusted like the pool and has no checksums;
blocks on a disk have (see `disk_blocks`). An OffloadPlan says what to move.
"""

import time

import torch

from quire.kv_cache.storage import KVCache, lazy_zeros
from quire.kv_cache.tiers import HOST
from quire.runner.disk_blocks import HEADER_BYTES, DiskBlocks
from quire.step import OffloadPlan, OffloadResult

MAX_WAIT_SECONDS = 0.05
"""The longest a step waits for a read. New requests and aborts wait with it."""


class BlockStore:
    """The disk's files, and `num_host_blocks` blocks in host memory."""

    def __init__(self, kv_cache: KVCache, *, num_host_blocks: int = 0, disk: DiskBlocks | None = None) -> None:
        self._kv_cache = kv_cache
        self._disk = disk
        self._host = _host_memory(num_host_blocks, kv_cache)
        self._slots: dict[bytes, list[int]] = {}
        """The blocks of host memory that hold a stored block; a recurrent state may take several."""
        self._free_slots = list(range(num_host_blocks - 1, -1, -1))

    def store(self, plan: OffloadPlan) -> None:
        """Carry out the first half of a plan: what leaves the pool, and the tiers."""
        for tier, block_hash in plan.evicted:
            if tier == HOST:
                self._free_slots += self._slots.pop(block_hash)
            else:
                self._files.remove(block_hash)
        for tier, block_hash, block in plan.stores:
            if tier == HOST:
                self._store_in_host(block_hash, block)
            else:
                buffer = self._files.new_buffer(self._kv_cache.num_bytes(block))
                self._kv_cache.copy_out(block, _content(buffer))
                self._files.save(block_hash, buffer)
        for block_hash in plan.cancelled:
            self._files.release_buffer(self._files.take_buffer(block_hash))

    def load(self, plan: OffloadPlan) -> float:
        """Carry out the second half of a plan: what comes back. Returns the seconds spent on loads from host memory."""
        seconds = 0.0
        for tier, block_hash, block in plan.loads:
            if tier == HOST:
                started = time.perf_counter()
                slots = self._slots[block_hash]
                content = self._host[slots[0]] if len(slots) == 1 else self._host[slots].view(-1)
                self._kv_cache.copy_in(block, content)
                self._kv_cache.synchronize()
                seconds += time.perf_counter() - started
            else:
                buffer = self._files.take_buffer(block_hash)
                self._kv_cache.copy_in(block, _content(buffer))
                self._files.release_buffer(buffer)
        for block_hash in plan.reads:
            self._files.read(block_hash)
        return seconds

    def _store_in_host(self, block_hash: bytes, block: int) -> None:
        num_bytes, size = self._kv_cache.num_bytes(block), self._kv_cache.block_bytes
        slots = self._slots[block_hash] = [self._free_slots.pop() for _ in range(-(-num_bytes // size))]
        if len(slots) == 1:
            self._kv_cache.copy_out(block, self._host[slots[0]])
            return
        content = torch.zeros(len(slots) * size, dtype=torch.uint8)
        self._kv_cache.copy_out(block, content)
        self._host[slots] = content.view(len(slots), size)

    def collect(self, *, wait: bool) -> OffloadResult:
        """What has ended in the background. With `wait`, waits for a read to end, at most MAX_WAIT_SECONDS."""
        if self._disk is None:
            return OffloadResult()
        return self._disk.collect(MAX_WAIT_SECONDS if wait else 0.0)

    def close(self) -> None:
        """Write the queued blocks and close the files."""
        if self._disk is not None:
            self._disk.close()

    @property
    def _files(self) -> DiskBlocks:
        assert self._disk is not None, "a plan names the disk tier, but there is none"
        return self._disk


def _host_memory(num_blocks: int, kv_cache: KVCache) -> torch.Tensor:
    """uint8 [num_blocks, block_bytes]. For a GPU it is pinned, so that copies need no host; otherwise it takes no
    memory until it is written."""
    if kv_cache.device.type == "cuda":
        return torch.empty(num_blocks, kv_cache.block_bytes, dtype=torch.uint8, pin_memory=True)
    return lazy_zeros(num_blocks * kv_cache.block_bytes).view(num_blocks, kv_cache.block_bytes)


def _content(buffer: bytearray) -> torch.Tensor:
    """A buffer's block as uint8 [block_bytes], in the same memory."""
    return torch.frombuffer(buffer, dtype=torch.uint8, offset=HEADER_BYTES)
