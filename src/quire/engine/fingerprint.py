"""Fingerprint: a hash of everything besides tokens that determines the KV of a block. Disk blocks are stored under it.

It covers config.json and how images are processed; the name, size, modification time and header of each safetensors or
GGUF file (name, dtype, shape and offset of every tensor, not the bytes, since hashing them takes as long as loading);
the dtypes of weights and KV, the layout and the block size; which of two rotations keys have, where a model has two;
the seed of random weights; the version of Quire, the device, the backend and the instruction set of the CPU kernels,
since each may change the last bits of a value. If any of these changes, no stored block is found.
"""

from hashlib import blake2b
from pathlib import Path

from quire import __version__
from quire.config import EngineConfig
from quire.engine.memory_plan import MemoryPlan
from quire.gguf.file import is_gguf, read_gguf
from quire.runner.disk_folder import FINGERPRINT_BYTES

KV_LAYOUT = "as the backend has it, layer after layer"
_MAX_HEADER_BYTES = 100_000_000
_GGUF_BYTES = 1 << 20
"""First bytes of a GGUF file, which hold all of the metadata but the vocabulary."""


def fingerprint(
    config: EngineConfig, plan: MemoryPlan, folder: Path, instruction_set: str, *, long_rope: bool = False
) -> bytes:
    """BLAKE2b hash of FINGERPRINT_BYTES bytes. `long_rope`: keys are rotated for long contexts."""
    computed = f"{instruction_set} {plan.device} {plan.attention_backend}"
    kv = (KV_LAYOUT, computed, plan.kv_cache_dtype, str(plan.block_size), *(["long rope"] if long_rope else []))
    return _digest(config, plan, folder, kv)


def weights_fingerprint(config: EngineConfig, plan: MemoryPlan, folder: Path) -> bytes:
    """Fingerprint of the weights only; the packing is recorded in the cache entry."""
    return _digest(config, plan, folder, ("packed weights",))


def _digest(config: EngineConfig, plan: MemoryPlan, folder: Path, texts: tuple[str, ...]) -> bytes:
    digest = blake2b(digest_size=FINGERPRINT_BYTES)

    def add(value: bytes) -> None:
        digest.update(len(value).to_bytes(8, "little") + value)

    for text in (__version__, f"{plan.dtype} {plan.quantization}", *texts):
        add(text.encode())
    files = read_gguf(folder).files if is_gguf(folder) else ()
    if not files:
        add((folder / "config.json").read_bytes())
        for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
            if path.is_file():  # images are normalised as it says
                add(path.read_bytes())
    if config.load_format == "dummy":
        add(b"dummy %d" % config.seed)
        return digest.digest()
    for path in files or sorted(folder.glob("*.safetensors")):
        status = path.stat()
        add(path.name.encode())
        add(b"%d %d" % (status.st_size, status.st_mtime_ns))
        with path.open("rb") as file:
            length = _GGUF_BYTES if files else int.from_bytes(file.read(8), "little")
            add(file.read(min(length, _MAX_HEADER_BYTES)))
    return digest.digest()
