"""LoadAhead: what of loading needs no torch, done by threads while the process spends a second on importing it.

Where an earlier start has left packed weights, they are mapped and checked. Elsewhere the checkpoint is read into the
system's file cache, and the memory that weights are packed into is taken, and that of a step's activations: fresh
pages are handed out slower than weights are packed, the slower where a hypervisor must find them first.
"""

import contextlib
import ctypes
import gc
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from quire.config import EngineConfig
from quire.engine.device import usable_cores
from quire.engine.fingerprint import weights_fingerprint
from quire.engine.heap import Heap
from quire.engine.memory_plan import MemoryPlan
from quire.model_config import ModelConfig
from quire.models.weights_cache import PackedTensor, WeightsCache

PACKING_BACKEND = "cpu"
"""The backend whose weights are packed; others keep them as they are stored, on a device."""
_PIECE_BYTES = 64 << 20
_MOST_TOKENS = 512
"""Of a step whose activations are there from the start: what is asked for beyond that comes when it is needed."""


class LoadAhead:
    """Threads at work for one model from the moment this is made until `finish`."""

    def __init__(
        self, folder: Path | None, packed_bytes: int, cache: WeightsCache | None = None, heap: Heap | None = None
    ) -> None:
        """Begin for the checkpoint in `folder`, None for weights that are no files; `packed_bytes` is what they take
        when packed, 0 where nothing is packed; `heap` is what activations will come from."""
        self.cache = cache
        self._heap = heap
        self.stored: list[PackedTensor] = []
        """What the cache holds, after `finish`."""
        self.memory: mmap.mmap | None = None
        """Zeros to pack weights into, for a backend that packs."""
        self._finished = threading.Event()
        tasks: list[Callable[[], None]] = []
        if packed_bytes:
            memory = self.memory = mmap.mmap(-1, packed_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            tasks.append(lambda: self._take_pages(memory))
        if folder is not None:
            tasks.append(lambda: self._read(folder))
        if cache is not None and cache.path.is_file():
            tasks = [lambda: self._load_stored(cache)]
        if heap is not None:
            tasks.append(lambda: heap.take_pages(self._finished.is_set))
        self._threads = [threading.Thread(target=task, daemon=True) for task in tasks]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Stop, but for the checking of stored weights; from now on whoever packs has the cores to itself."""
        self._finished.set()
        for thread in self._threads:
            thread.join()
        if self._heap is not None:
            self._heap.open()

    def _load_stored(self, cache: WeightsCache) -> None:
        self.stored = cache.load(max(1, usable_cores() - 1))  # the import has one to itself

    def _take_pages(self, memory: mmap.mmap) -> None:
        # Pages of the plain size: a huge one is more likely to be one that a hypervisor has taken back (docs/log.md).
        if Path("/sys/devices/system/node/node1").exists():
            return  # pages belong to the node of the thread that takes them, and should to that of one that reads them
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for begin in range(0, len(memory), _PIECE_BYTES):
            if self._finished.is_set():
                return
            # Written, not asked for with madvise: that would lock the address space against the import's own needs.
            ctypes.memset(address + begin, 0, min(_PIECE_BYTES, len(memory) - begin))

    def _read(self, folder: Path) -> None:
        for path in sorted(folder.glob("*.safetensors")):
            if not hasattr(os, "posix_fadvise"):
                return
            with contextlib.suppress(OSError), path.open("rb") as file:  # whoever loads it will say what is wrong
                for begin in range(0, os.fstat(file.fileno()).st_size, _PIECE_BYTES):
                    if self._finished.is_set():
                        return
                    os.posix_fadvise(file.fileno(), begin, _PIECE_BYTES, os.POSIX_FADV_WILLNEED)


def load_ahead(config: EngineConfig, model_config: ModelConfig, plan: MemoryPlan, folder: Path) -> LoadAhead:
    """Begin, for what `EngineCore.load` will be given."""
    source = None if config.load_format == "dummy" else folder
    heap = None
    if plan.device == "cpu":
        num_tokens = min(plan.max_num_batched_tokens, _MOST_TOKENS)
        heap = Heap(plan.activations + plan.logprobs, model_config.spec.activation_bytes(num_tokens, 1))
    if plan.attention_backend != PACKING_BACKEND:
        return LoadAhead(source, 0, heap=heap)
    cache = None
    if config.weights_cache is not None and source is not None:
        key = weights_fingerprint(config, plan, folder)
        cache = WeightsCache(config.weights_cache, key, config.weights_cache_size)
    return LoadAhead(source, model_config.spec.packed_bytes(plan.dtype, plan.quantization), cache, heap)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports: they make a million objects that stay, and looking through them again and again finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Straight to the oldest generation, so that the next collection does not look through them either.
        gc.freeze()
        gc.unfreeze()
        if was_enabled:
            gc.enable()
