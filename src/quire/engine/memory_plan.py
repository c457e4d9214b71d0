"""MemoryPlan: what weights, activations and KV blocks will take, computed from config.json before anything is loaded.

The plan is arithmetic over the model's shape and the options; nothing is allocated by trial. A plan that does not fit
is refused with the numbers and with what would fit.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quire.backends import BACKENDS, MAX_CAPTURED_TOKENS, Backend, choose_backend
from quire.config import EngineConfig
from quire.dtypes import DTYPE_BYTES, FLOAT32_BYTES
from quire.engine.device import Device, find_device
from quire.errors import ConfigError, MemoryPlanError
from quire.kv_cache.tiers import num_staged_blocks
from quire.model_config import ModelConfig
from quire.quantization import METHODS
from quire.step import logprob_bytes

MIN_BATCHED_TOKENS = 512
"""Enough rows for matrix products to run at full speed on a CPU, few enough that a step stays below half a second."""
KV_SHARE = 0.5
"""Share of the memory left beside weights and activations that the KV pool takes if not told otherwise."""
MIN_BATCHED_TOKENS_ON_GPU = 8192
"""Enough rows for a GPU to compute at full rate while a long prompt is read; a step of an 8B model takes 0.2 s then."""
CONTEXT_BYTES = 640 * 2**20
"""What a CUDA context, its kernels and the workspaces of cuBLAS take of a card before anything is allocated."""
GRAPH_BYTES = 256 * 2**20
"""Allowance for what captured steps take beside their activations: their launches, a workspace of cuBLAS."""
DRAW_BYTES_PER_LOGIT = 4 + 4 + 8
"""Sampling on a device: float32 logits, and a sorted copy with its ids."""
LISTED_BYTES_PER_LOGIT = 4
"""The same with kernels that list ids instead of sorting: at most all of them."""
PLAN_TOLERANCE = 0.01
"""By how much allocations may exceed the plan: they are rounded up, and a table of positions comes with the weights."""

LOGPROB_POSITIONS = 64
"""Positions whose log-probabilities are worked out at once if not told otherwise: enough for full-speed products."""
MAX_LOGPROBS_MEMORY = 64 * 2**20
"""Bytes for them if not told otherwise, however large the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes in bytes, counts in tokens, blocks and sequences; every open option of the config is decided here."""

    device: str = "cpu"
    device_name: str = ""
    attention_backend: str = "cpu"
    dtype: str
    quantization: str | None = None
    kv_cache_dtype: str
    available: int
    weights: int
    activations: int
    logprobs: int
    """Budget in which log-probabilities of prompts and samples are worked out, piece by piece."""
    kv_cache: int
    kv_bytes_per_token: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    swap_space: int = 0
    """Of the host tier: whole blocks."""
    staging: int = 0
    """Of blocks on their way to and from the disk tier."""
    context: int = 0
    """What a device takes before anything is allocated."""
    graphs: int = 0
    """Allowance for captured steps."""
    async_scheduling: bool = False

    @property
    def total(self) -> int:
        """Of `available`: on a card of its own memory, tiers and staging are the host's and do not count."""
        device = self.weights + self.activations + self.logprobs + self.kv_cache + self.context + self.graphs
        return device if self.device == "cuda" else device + self.swap_space + self.staging

    @property
    def num_longest_sequences(self) -> int:
        """How many sequences of the longest context fit at once."""
        return self.num_blocks // -(-self.max_model_len // self.block_size)

    def surplus(self, allocated: int) -> str:
        """What to say of the bytes this process itself has allocated once weights and KV cache are there, if it is more
        than planned; else nothing. What others take of a card is never asked."""
        planned = self.weights + self.kv_cache
        if allocated <= planned * (1 + PLAN_TOLERANCE):
            return ""
        return (
            f"memory plan: weights and KV cache were planned as {show_bytes(planned)}, but take "
            f"{show_bytes(allocated)}; lower gpu_memory_utilization if steps run out of memory"
        )

    def describe(self) -> list[str]:
        """The plan in a few lines, as printed at start."""
        longest = self.num_longest_sequences
        computed = [f"device: {self.device_name or self.device}, attention {self.attention_backend}"]
        return [
            *(computed if self.attention_backend != "cpu" else []),
            f"memory: {show_bytes(self.total)} of {show_bytes(self.available)} available = "
            f"weights {show_bytes(self.weights)} ({self.quantization or self.dtype}) "
            f"+ activations {show_bytes(self.activations)} ({self.max_num_batched_tokens} tokens a step) "
            f"+ log-probabilities {show_bytes(self.logprobs)} "
            f"+ KV cache {show_bytes(self.kv_cache)} ({self.kv_cache_dtype})"
            + (f" + CUDA context {show_bytes(self.context)}" if self.context else "")
            + (f" + CUDA graphs {show_bytes(self.graphs)}" if self.graphs else "")
            + (", of the host" if self.device == "cuda" and self.swap_space + self.staging else "")
            + (f" + swap space {show_bytes(self.swap_space)}" if self.swap_space else "")
            + (f" + staging {show_bytes(self.staging)} for the disk tier" if self.staging else ""),
            f"KV cache: {self.num_blocks} blocks of {self.block_size} tokens "
            f"= {self.num_blocks * self.block_size} tokens of {show_bytes(self.kv_bytes_per_token)}; "
            f"longest context {self.max_model_len} tokens, {longest} sequence{'s' * (longest != 1)} of it fit, "
            f"at most {self.max_num_seqs} run at once",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "num_longest_sequences": self.num_longest_sequences}


def plan_memory(
    config: EngineConfig, model: ModelConfig, available: int | None = None, *, device: Device | None = None
) -> MemoryPlan:
    """Decide every size. Raises `MemoryPlanError` for a plan that cannot fit, `ConfigError` for options at odds.

    A card's memory is known from its size alone; what others have taken of it at this moment never decides anything.
    """
    device = device or find_device(config.device)
    name = choose_backend(config.attention_backend, device.type, device.capability)
    backend = BACKENDS[name]
    host = available_memory() if available is None else available
    own_memory = device.total_memory is not None
    available = int((device.total_memory or 0) * config.gpu_memory_utilization) if own_memory else host
    dtype = _dtype(config, model, device)
    kv_dtype = _kv_cache_dtype(config, dtype, backend, device)
    _check_backend(config, name, backend, kv_dtype, device)
    block_size = config.block_size or backend.block_size
    min_batched = MIN_BATCHED_TOKENS_ON_GPU if own_memory else MIN_BATCHED_TOKENS
    batched = config.max_num_batched_tokens or max(min_batched, config.max_num_seqs)
    weights = model.spec.weight_bytes(dtype, config.quantization)
    activations = model.spec.activation_bytes(batched, max_num_samples(config))
    if not backend.float32_activations:
        activations = _device_activations(backend, model, dtype, batched, max_num_samples(config))
    context = CONTEXT_BYTES if device.type == "cuda" else 0
    captures = device.type == "cuda" and backend.captures and not config.enforce_eager
    graphs = _graph_bytes(model, dtype, min(MAX_CAPTURED_TOKENS, max_num_samples(config))) if captures else 0
    per_token = model.spec.kv_bytes_per_token(kv_dtype)
    per_block = per_token * block_size
    swap_space = (config.swap_space or 0) // per_block * per_block
    if config.swap_space is not None and not swap_space:
        raise MemoryPlanError(
            f"swap_space is {show_bytes(config.swap_space)}, less than one block of {block_size} tokens, "
            f"which takes {show_bytes(per_block)}; give a size such as 4GiB"
        )
    staging = 2 * num_staged_blocks(per_block) * per_block if config.disk_cache is not None else 0
    logprobs = _logprobs_budget(config, model)
    left = available - weights - activations - logprobs - context - graphs
    if not own_memory:
        left -= swap_space + staging
    elif swap_space + staging > host:
        raise MemoryPlanError(
            f"swap_space and staging take {show_bytes(swap_space + staging)} of the host's memory, of which "
            f"{show_bytes(host)} is available; give less"
        )
    if left < per_block:
        raise MemoryPlanError(
            f"the model does not fit: weights take {show_bytes(weights)} as {config.quantization or dtype} beside "
            f"activations {show_bytes(activations)} and log-probabilities {show_bytes(logprobs)}, "
            + (f"tiers below the KV cache {show_bytes(swap_space + staging)}, " if swap_space + staging else "")
            + (f"CUDA context and graphs {show_bytes(context + graphs)}, " if context else "")
            + f"but {show_bytes(available)} are available"
            + (
                f", gpu_memory_utilization {config.gpu_memory_utilization:g} of {show_bytes(device.total_memory or 0)}"
                if own_memory
                else ""
            )
            + _smaller_weights(model, dtype, config.quantization, available)
        )
    wanted_len = config.max_model_len or model.context_length
    if wanted_len > model.context_length and config.max_model_len:
        raise ConfigError(
            f"max_model_len is {wanted_len}, but the model knows {model.context_length} positions; ask for at most that"
        )
    blocks_per_sequence = -(-wanted_len // block_size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory // per_block
    else:
        # More than every sequence at full length could never be used.
        share = 1.0 if own_memory else KV_SHARE
        num_blocks = min(int(left * share) // per_block, config.max_num_seqs * blocks_per_sequence)
    if num_blocks < 1:
        raise MemoryPlanError(
            f"the KV cache has no room for one block of {block_size} tokens, "
            f"which takes {show_bytes(per_block)}; raise kv_cache_memory"
        )
    if num_blocks * per_block > left:
        raise MemoryPlanError(
            f"{num_blocks} KV blocks take {show_bytes(num_blocks * per_block)}, but beside weights, activations "
            f"and log-probabilities {show_bytes(left)} are left; {left // per_block} blocks "
            f"({show_bytes(left // per_block * per_block)}) would fit"
        )
    if blocks_per_sequence > num_blocks and config.max_model_len is not None:
        raise MemoryPlanError(
            f"a sequence of max_model_len {wanted_len} tokens takes {show_bytes(blocks_per_sequence * per_block)} of "
            f"KV cache, but the pool has {num_blocks} blocks of {block_size} tokens; "
            f"max_model_len {num_blocks * block_size} would fit, or "
            f"kv_cache_memory {show_bytes(blocks_per_sequence * per_block)}"
        )
    return MemoryPlan(
        device=device.type,
        device_name=device.name,
        attention_backend=name,
        dtype=dtype,
        quantization=config.quantization,
        kv_cache_dtype=kv_dtype,
        available=available,
        weights=weights,
        activations=activations,
        logprobs=logprobs,
        kv_cache=num_blocks * per_block,
        kv_bytes_per_token=per_token,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=min(wanted_len, num_blocks * block_size),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=batched,
        swap_space=swap_space,
        staging=staging,
        context=context,
        graphs=graphs,
        async_scheduling=device.type == "cuda" if config.async_scheduling is None else config.async_scheduling,
    )


def max_num_samples(config: EngineConfig) -> int:
    """Rows of logits of the largest step: every sequence's, and those of one longest draft."""
    drafted = config.speculative_config.num_speculative_tokens if config.speculative_config is not None else 0
    return config.max_num_seqs + drafted


def _dtype(config: EngineConfig, model: ModelConfig, device: Device) -> str:
    if config.dtype != "auto":
        return config.dtype
    # Cards before Ampere compute in float16 but not in bfloat16.
    if device.type == "cuda" and device.capability < (8, 0) and model.checkpoint_dtype == "bfloat16":
        return "float16"
    return model.checkpoint_dtype


def _check_backend(config: EngineConfig, name: str, backend: Backend, kv_dtype: str, device: Device) -> None:
    """Refuse what the backend's kernels do not have."""
    if kv_dtype not in backend.kv_cache_dtypes:
        able = [other for other, row in BACKENDS.items() if kv_dtype in row.kv_cache_dtypes]
        raise ConfigError(
            f"kv_cache_dtype is {kv_dtype}, which the {name} backend cannot store; it stores "
            f"{', '.join(backend.kv_cache_dtypes)}. attention_backend {' and '.join(able)} can"
        )
    if kv_dtype == "fp8_e4m3" and device.type == "cuda" and device.capability < backend.float8_capability:
        needed, found = (".".join(map(str, version)) for version in (backend.float8_capability, device.capability))
        raise ConfigError(
            f"kv_cache_dtype is fp8_e4m3, for which the {name} backend needs a CUDA device of capability {needed}, but "
            f"this one has {found}; leave it out, or choose attention_backend sdpa"
        )
    if config.deterministic and not backend.deterministic:
        able = [other for other, row in BACKENDS.items() if row.deterministic]
        raise ConfigError(
            f"deterministic is asked for, but what the {name} backend computes can depend on the batch; leave it out, "
            f"or choose attention_backend {' or '.join(able)}"
        )
    if config.block_size and backend.block_sizes and config.block_size not in backend.block_sizes:
        raise ConfigError(
            f"block_size is {config.block_size}; the {name} backend takes {', '.join(map(str, backend.block_sizes))}"
        )
    if config.quantization is not None and not backend.quantizes:
        able = [other for other, row in BACKENDS.items() if row.quantizes]
        raise ConfigError(
            f"quantization is {config.quantization}, but the {name} backend has no layers of few bits; leave it out, "
            f"or choose attention_backend {' or '.join(able)}"
        )


def _device_activations(backend: Backend, model: ModelConfig, dtype: str, num_tokens: int, num_seqs: int) -> int:
    """Peak of a step on a device, whose activations are in `dtype`, and whose sampling sorts at worst."""
    size = DTYPE_BYTES[dtype]
    tokens = model.spec.activation_bytes(num_tokens, 0) * size // FLOAT32_BYTES
    logits = num_seqs * model.vocab_size * (size + DRAW_BYTES_PER_LOGIT)
    rope = model.context_length * model.head_dim * FLOAT32_BYTES
    # Keys and values, each as it is stored and as it is read.
    gathered = 2 * backend.gathered_slots * model.spec.largest_kv * size
    return tokens + logits + rope + gathered + backend.workspace


def _graph_bytes(model: ModelConfig, dtype: str, num_tokens: int) -> int:
    """Of all captured steps: they use one memory for their activations, logits and what draws list of them, and one for
    logits that the host asks for."""
    size = DTYPE_BYTES[dtype]
    activations = model.spec.activation_bytes(num_tokens, 0) * size // FLOAT32_BYTES
    return GRAPH_BYTES + activations + num_tokens * model.vocab_size * (2 * size + LISTED_BYTES_PER_LOGIT)


def available_memory() -> int:
    """Bytes this process may still take: what the system has available, or less where a control group limits it."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = pages
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such control group, or "max"
    return max(0, available)


def show_bytes(size: int) -> str:
    """A size as people read it: 1.5 GiB, 24 KiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def _kv_cache_dtype(config: EngineConfig, dtype: str, backend: Backend, device: Device) -> str:
    """As asked; else that of the activations, or where these are always float32: float32 beside float32 weights, where
    fewer bits change tokens, and 16 bits beside all others, whose own rounding is larger (docs/decisions/0016)."""
    if config.kv_cache_dtype != "auto":
        return config.kv_cache_dtype
    if not backend.float32_activations:
        return dtype
    if config.quantization is None and dtype != "bfloat16":
        return dtype
    return "bfloat16" if device.multiplies_bfloat16 else "float16"


def _smaller_weights(model: ModelConfig, dtype: str, quantization: str | None, available: int) -> str:
    """What the weights would take in the ways of storing them that are smaller, and small enough."""
    choices = {} if DTYPE_BYTES[dtype] <= 2 or quantization else {"float16": model.spec.weight_bytes("float16")}
    choices |= {f"quantization {name}": model.spec.weight_bytes(dtype, name) for name in METHODS}
    now = model.spec.weight_bytes(dtype, quantization)
    fitting = [
        f"as {name} the weights take {show_bytes(size)}" for name, size in choices.items() if size < min(now, available)
    ]
    return "; " + ", ".join(fitting) if fitting else ""


def _logprobs_budget(config: EngineConfig, model: ModelConfig) -> int:
    """Bytes for log-probabilities: as asked, or for `LOGPROB_POSITIONS`; one position must fit."""
    position = logprob_bytes(model.vocab_size, config.max_logprobs)
    if config.logprobs_memory is None:
        return max(position, min(LOGPROB_POSITIONS * position, MAX_LOGPROBS_MEMORY))
    if config.logprobs_memory < position:
        raise MemoryPlanError(
            f"logprobs_memory is {show_bytes(config.logprobs_memory)}, but one position with max_logprobs "
            f"{config.max_logprobs} of a vocabulary of {model.vocab_size} tokens takes {show_bytes(position)}; "
            "give at least that"
        )
    return config.logprobs_memory
