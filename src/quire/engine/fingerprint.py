"""What decides the keys and values of a block besides its tokens: a hash that blocks on disk are kept under.

It covers config.json, and of each safetensors file the name, size, time of change and header (every tensor's name,
dtype, shape and place; not the bytes themselves, which would take as long as loading); the dtypes of weights and KV,
the layout and the block size; whether weights are random, and their seed; the version of Quire, the device, the backend
and the CPU kernels' instruction set, since each may change the last bits of a value. Any of it different, and nothing
stored is found.
"""

from hashlib import blake2b
from pathlib import Path

from quire import __version__
from quire.config import EngineConfig
from quire.engine.memory_plan import MemoryPlan
from quire.runner.disk_blocks import FINGERPRINT_BYTES

KV_LAYOUT = "as the backend has it, layer after layer"
_MAX_HEADER_BYTES = 100_000_000


def fingerprint(config: EngineConfig, plan: MemoryPlan, folder: Path, instruction_set: str) -> bytes:
    """FINGERPRINT_BYTES of BLAKE2b."""
    computed = f"{instruction_set} {plan.device} {plan.attention_backend}"
    kv = (KV_LAYOUT, computed, plan.kv_cache_dtype, str(plan.block_size))
    return _digest(config, plan, folder, kv)


def weights_fingerprint(config: EngineConfig, plan: MemoryPlan, folder: Path) -> bytes:
    """The same of the weights alone; how they were packed is told by what is kept under it."""
    return _digest(config, plan, folder, ("packed weights",))


def _digest(config: EngineConfig, plan: MemoryPlan, folder: Path, texts: tuple[str, ...]) -> bytes:
    digest = blake2b(digest_size=FINGERPRINT_BYTES)

    def add(value: bytes) -> None:
        digest.update(len(value).to_bytes(8, "little") + value)

    for text in (__version__, f"{plan.dtype} {plan.quantization}", *texts):
        add(text.encode())
    add((folder / "config.json").read_bytes())
    if config.load_format == "dummy":
        add(b"dummy %d" % config.seed)
        return digest.digest()
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        add(path.name.encode())
        add(b"%d %d" % (status.st_size, status.st_mtime_ns))
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            add(file.read(min(length, _MAX_HEADER_BYTES)))
    return digest.digest()
