"""MemoryPlan: what weights, activations and KV blocks will take, computed from config.json before anything is loaded.

The plan is arithmetic over the model's shape and the options; nothing is allocated by trial. A plan that does not fit
is refused with the numbers and with what would fit.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quire.config import EngineConfig
from quire.errors import ConfigError, MemoryPlanError
from quire.kv_cache.tiers import num_staged_blocks
from quire.model_config import DTYPE_BYTES, ModelConfig
from quire.quantization import METHODS
from quire.step import logprob_bytes

MIN_BATCHED_TOKENS = 512
"""Enough rows for matrix products to run at full speed on a CPU, few enough that a step stays below half a second."""
KV_SHARE = 0.5
"""Share of the memory left beside weights and activations that the KV pool takes if not told otherwise."""

LOGPROB_POSITIONS = 64
"""Positions whose log-probabilities are worked out at once if not told otherwise: enough for full-speed products."""
MAX_LOGPROBS_MEMORY = 64 * 2**20
"""Bytes for them if not told otherwise, however large the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes in bytes, counts in tokens, blocks and sequences; every open option of the config is decided here."""

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

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.logprobs + self.kv_cache + self.swap_space + self.staging

    @property
    def num_longest_sequences(self) -> int:
        """How many sequences of the longest context fit at once."""
        return self.num_blocks // -(-self.max_model_len // self.block_size)

    def describe(self) -> list[str]:
        """The plan in a few lines, as printed at start."""
        longest = self.num_longest_sequences
        return [
            f"memory: {show_bytes(self.total)} of {show_bytes(self.available)} available = "
            f"weights {show_bytes(self.weights)} ({self.quantization or self.dtype}) "
            f"+ activations {show_bytes(self.activations)} ({self.max_num_batched_tokens} tokens a step) "
            f"+ log-probabilities {show_bytes(self.logprobs)} "
            f"+ KV cache {show_bytes(self.kv_cache)} ({self.kv_cache_dtype})"
            + (f" + swap space {show_bytes(self.swap_space)}" if self.swap_space else "")
            + (f" + staging {show_bytes(self.staging)} for the disk tier" if self.staging else ""),
            f"KV cache: {self.num_blocks} blocks of {self.block_size} tokens "
            f"= {self.num_blocks * self.block_size} tokens of {show_bytes(self.kv_bytes_per_token)}; "
            f"longest context {self.max_model_len} tokens, {longest} sequence{'s' * (longest != 1)} of it fit, "
            f"at most {self.max_num_seqs} run at once",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "num_longest_sequences": self.num_longest_sequences}


def plan_memory(config: EngineConfig, model: ModelConfig, available: int | None = None) -> MemoryPlan:
    """Decide every size. Raises `MemoryPlanError` for a plan that cannot fit, `ConfigError` for options at odds."""
    available = available_memory() if available is None else available
    dtype = model.checkpoint_dtype if config.dtype == "auto" else config.dtype
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    batched = config.max_num_batched_tokens or max(MIN_BATCHED_TOKENS, config.max_num_seqs)
    weights = model.weight_bytes(dtype, config.quantization)
    activations = model.activation_bytes(batched, max_num_samples(config))
    per_token = model.kv_bytes_per_token(kv_dtype)
    per_block = per_token * config.block_size
    swap_space = (config.swap_space or 0) // per_block * per_block
    if config.swap_space is not None and not swap_space:
        raise MemoryPlanError(
            f"swap_space is {show_bytes(config.swap_space)}, less than one block of {config.block_size} tokens, "
            f"which takes {show_bytes(per_block)}; give a size such as 4GiB"
        )
    staging = 2 * num_staged_blocks(per_block) * per_block if config.disk_cache is not None else 0
    logprobs = _logprobs_budget(config, model)
    left = available - weights - activations - logprobs - swap_space - staging
    if left < per_block:
        raise MemoryPlanError(
            f"the model does not fit: weights take {show_bytes(weights)} as {config.quantization or dtype} beside "
            f"activations {show_bytes(activations)} and log-probabilities {show_bytes(logprobs)}, "
            + (f"tiers below the KV cache {show_bytes(swap_space + staging)}, " if swap_space + staging else "")
            + f"but {show_bytes(available)} are available"
            + _smaller_weights(model, dtype, config.quantization, available)
        )
    wanted_len = config.max_model_len or model.context_length
    if wanted_len > model.context_length and config.max_model_len:
        raise ConfigError(
            f"max_model_len is {wanted_len}, but the model knows {model.context_length} positions; ask for at most that"
        )
    blocks_per_sequence = -(-wanted_len // config.block_size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory // per_block
    else:
        # More than every sequence at full length could never be used.
        num_blocks = min(int(left * KV_SHARE) // per_block, config.max_num_seqs * blocks_per_sequence)
    if num_blocks < 1:
        raise MemoryPlanError(
            f"the KV cache has no room for one block of {config.block_size} tokens, "
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
            f"KV cache, but the pool has {num_blocks} blocks of {config.block_size} tokens; "
            f"max_model_len {num_blocks * config.block_size} would fit, or "
            f"kv_cache_memory {show_bytes(blocks_per_sequence * per_block)}"
        )
    return MemoryPlan(
        dtype=dtype,
        quantization=config.quantization,
        kv_cache_dtype=kv_dtype,
        available=available,
        weights=weights,
        activations=activations,
        logprobs=logprobs,
        kv_cache=num_blocks * per_block,
        kv_bytes_per_token=per_token,
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_model_len=min(wanted_len, num_blocks * config.block_size),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=batched,
        swap_space=swap_space,
        staging=staging,
    )


def max_num_samples(config: EngineConfig) -> int:
    """Rows of logits of the largest step: every sequence's, and those of one longest draft."""
    drafted = config.speculative_config.num_speculative_tokens if config.speculative_config is not None else 0
    return config.max_num_seqs + drafted


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


def _smaller_weights(model: ModelConfig, dtype: str, quantization: str | None, available: int) -> str:
    """What the weights would take in the ways of storing them that are smaller, and small enough."""
    choices = {} if DTYPE_BYTES[dtype] <= 2 or quantization else {"float16": model.weight_bytes("float16")}
    choices |= {f"quantization {name}": model.weight_bytes(dtype, name) for name in METHODS}
    now = model.weight_bytes(dtype, quantization)
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
