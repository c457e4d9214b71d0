"""Preloader: threads that do the torch-free part of loading during the second in which the process imports torch.

If an earlier start left packed weights, they are mapped and checked. Otherwise the checkpoint is read into the system's
file cache, and the memory for packed weights and for a step's activations is taken: the system hands out fresh pages
more slowly than weights are packed, and a hypervisor that must find the pages first makes it slower still.
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
from quire.engine.checkpoint import weight_files
from quire.engine.device import usable_cores
from quire.engine.fingerprint import weights_fingerprint
from quire.engine.malloc_arena import MallocArena
from quire.engine.memory_plan import MemoryPlan
from quire.engine.rank_parts import part_of
from quire.model_config import ModelConfig
from quire.models.weights_cache import PackedTensor, WeightsCache

PACKING_BACKEND = "cpu"
"""The only backend that packs weights, except those of models that transformers computes; the others keep them on a
device in the checkpoint's layout."""
_PIECE_BYTES = 64 << 20
_MAX_PREALLOCATED_TOKENS = 512
"""Preallocate activations for steps of up to this many tokens; larger steps allocate the rest when they run."""


class Preloader:
    """Threads that work for one model from construction until `finish`."""

    def __init__(
        self,
        folder: Path | None,
        packed_bytes: int,
        cache: WeightsCache | None = None,
        arena: MallocArena | None = None,
    ) -> None:
        """Begin. `folder` is the checkpoint, None for weights without files. `packed_bytes` is the size of the packed
        weights, 0 if nothing is packed. Activations will be allocated from `arena`."""
        self.cache = cache
        self._arena = arena
        self.stored: list[PackedTensor] = []
        """Contents of the cache, after `finish`."""
        self.memory: mmap.mmap | None = None
        """Zeroed memory for packed weights; None for a backend that does not pack."""
        self._finished = threading.Event()
        tasks: list[Callable[[], None]] = []
        if packed_bytes:
            memory = self.memory = mmap.mmap(-1, packed_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            tasks.append(lambda: self._take_pages(memory))
        if folder is not None:
            tasks.append(lambda: self._read(folder))
        if cache is not None and cache.path.is_file():
            tasks = [lambda: self._load_stored(cache)]
        if arena is not None:
            tasks.append(lambda: arena.take_pages(self._finished.is_set))
        self._threads = [threading.Thread(target=task, daemon=True) for task in tasks]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Stop everything except the check of stored weights, and wait: packing needs all cores. Safe to repeat."""
        self._finished.set()
        for thread in self._threads:
            thread.join()
        if self._arena is not None:
            self._arena.free()

    def _load_stored(self, cache: WeightsCache) -> None:
        self.stored = cache.load(max(1, usable_cores() - 1))  # the import of torch keeps one core busy

    def _take_pages(self, memory: mmap.mmap) -> None:
        # Pages of normal size: a hypervisor is more likely to have taken back huge ones (docs/log.md).
        if Path("/sys/devices/system/node/node1").exists():
            return  # a page belongs to the NUMA node of the thread that touches it first, which must be its reader
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for begin in range(0, len(memory), _PIECE_BYTES):
            if self._finished.is_set():
                return
            # memset, not madvise: madvise locks the address space, and the import of torch needs it.
            ctypes.memset(address + begin, 0, min(_PIECE_BYTES, len(memory) - begin))

    def _read(self, folder: Path) -> None:
        for path in weight_files(folder):
            if not hasattr(os, "posix_fadvise"):
                return
            with contextlib.suppress(OSError), path.open("rb") as file:  # the load itself will report the error
                for begin in range(0, os.fstat(file.fileno()).st_size, _PIECE_BYTES):
                    if self._finished.is_set():
                        return
                    os.posix_fadvise(file.fileno(), begin, _PIECE_BYTES, os.POSIX_FADV_WILLNEED)


def preload(config: EngineConfig, model_config: ModelConfig, plan: MemoryPlan, folder: Path) -> Preloader:
    """Begin to preload for a `build_core` call with the same arguments."""
    model_config = part_of(config, model_config)
    source = None if config.load_format == "dummy" else folder
    arena = None
    if plan.device == "cpu":
        num_tokens = min(plan.max_num_batched_tokens, _MAX_PREALLOCATED_TOKENS)
        arena = MallocArena(plan.activations + plan.logprobs, model_config.spec.activation_bytes(num_tokens, 1))
    # Packed weights are used where their file is mapped.
    if plan.attention_backend != PACKING_BACKEND or model_config.computed_by or model_config.packed_as:
        return Preloader(source, 0, arena=arena)
    cache = None
    if config.weights_cache is not None and source is not None:
        key = weights_fingerprint(config, plan, folder)
        cache = WeightsCache(config.weights_cache, key, config.weights_cache_size)
    uses_blocks = model_config.block_bytes and plan.quantization is None
    packed_bytes = (
        model_config.block_bytes if uses_blocks else model_config.spec.packed_bytes(plan.dtype, plan.quantization)
    )
    return Preloader(source, packed_bytes, cache, arena)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector during imports: they create a million objects that stay, and scans find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Move them to the oldest generation, so that the next collection does not scan them either.
        gc.freeze()
        gc.unfreeze()
        if was_enabled:
            gc.enable()
