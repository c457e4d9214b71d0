"""MemoryPlan: what weights, activations and KV blocks will take, computed from config.json before anything is loaded.

The plan is arithmetic over the model's spec and the options; nothing is allocated by trial. `memory_budget.py` sizes
the parts beside the KV cache; `memory_refusals.py` refuses what does not fit, with the numbers and with what would fit.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from quire.backends import BACKENDS, Backend, choose_backend, has_package
from quire.config import EngineConfig
from quire.engine.device import Device, check_devices, find_device
from quire.engine.image_memory import NO_IMAGES, TEXT_TOKENS, ImageMemory
from quire.engine.memory_budget import MemoryBudget, StorageChoice, make_budget
from quire.engine.memory_refusals import (
    check_backend,
    check_context,
    check_model_fits,
    check_packed_form,
    check_parts,
    check_pool,
    check_whole_images,
    check_whole_texts,
    with_packed_form,
)
from quire.engine.memory_sizes import available_memory, show_bytes
from quire.engine.rank_parts import parts
from quire.engine.state_memory import StateMemory, plan_states
from quire.errors import ConfigError
from quire.kv_groups import KVGroup, describe_groups, most_blocks, window_alignment
from quire.model_config import ModelConfig

MIN_BATCHED_TOKENS = 512
"""Enough rows for matrix products to run at full speed on a CPU, few enough that a step stays below half a second."""
MIN_BATCHED_TOKENS_ON_GPU = 8192
"""Enough rows for a GPU to compute a long prompt at full rate; a step of an 8B model then takes 0.2 s."""
MIN_BATCHED_TOKENS_OF_ENCODER = 1024
"""No stream waits for a step of an encoder, and each step has its price."""
KV_SHARE = 0.5
"""Share of the memory left beside the other parts that the KV pool takes by default."""
PLAN_TOLERANCE = 0.01
"""By how much allocations may exceed the plan: they are rounded up, and a table of positions comes with the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes in bytes, counts in tokens, blocks and sequences. No option of the config is open any more."""

    device: str = "cpu"
    device_name: str = ""
    attention_backend: str = "cpu"
    dtype: str
    quantization: str | None = None
    stored: str = ""
    """Format and bits of a checkpoint of few bits, and what becomes of them."""
    kv_cache_dtype: str
    available: int
    weights: int
    activations: int
    logprobs: int
    """For log-probabilities of prompts and samples, which are computed piece by piece in it."""
    kv_cache: int
    kv_bytes_per_token: int
    """In all KV groups, while the token is inside every window."""
    kv_groups: tuple[KVGroup, ...] = ()
    block_size: int
    num_blocks: int
    longest_blocks: int
    """Blocks that a sequence of `max_model_len` tokens needs at once."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    swap_space: int = 0
    """The host tier: whole blocks."""
    staging: int = 0
    """Blocks on their way to and from the disk tier."""
    context: int = 0
    """Memory that a device takes before any allocation."""
    graphs: int = 0
    """Allowance for captured steps."""
    num_state_slots: int = 0
    """Slots for recurrent states: those of `max_num_seqs` sequences, and snapshots."""
    state_bytes: int = 0
    """One sequence's recurrent state."""
    adapters: int = 0
    """All slots of adapters."""
    images: ImageMemory = NO_IMAGES
    """For an image encoder and what it computes."""
    async_scheduling: bool = False
    num_ranks: int = 1
    """Ranks; all other sizes are those of one of them."""

    @property
    def total(self) -> int:
        """Planned part of `available`. On a card with memory of its own, tiers and staging are the host's and do not
        count."""
        device = self.weights + self.activations + self.logprobs + self.kv_cache + self.states
        device += self.context + self.graphs + self.adapters + self.images.num_bytes
        return device if self.device == "cuda" else device + self.swap_space + self.staging

    @property
    def states(self) -> int:
        """All slots for recurrent states."""
        return self.num_state_slots * self.state_bytes

    @property
    def num_longest_sequences(self) -> int:
        """How many sequences of the longest context fit at once."""
        return self.num_blocks // self.longest_blocks

    @property
    def num_image_users(self) -> int:
        """How many sequences with one image of the largest kind and `TEXT_TOKENS` of text fit at once."""
        num_tokens = self.images.tokens_per_image + TEXT_TOKENS
        if not self.images.tokens_per_image or num_tokens > self.max_model_len:
            return 0
        blocks = sum(most_blocks(num_tokens, group.window, self.block_size) for group in self.kv_groups)
        return min(self.max_num_seqs, self.num_blocks // blocks)

    def surplus(self, allocated: int) -> str:
        """A warning if this process has allocated more bytes for weights and KV cache than planned; else "". What other
        processes take of a card is never asked."""
        planned = self.weights + self.kv_cache + self.states
        if allocated <= planned * (1 + PLAN_TOLERANCE):
            return ""
        return (
            f"memory plan: weights and KV cache were planned as {show_bytes(planned)}, but take "
            f"{show_bytes(allocated)}; lower gpu_memory_utilization if steps run out of memory"
        )

    def describe(self) -> list[str]:
        """The plan in a few lines, as printed at start."""
        longest = self.num_longest_sequences
        states = (
            f"recurrent states: {self.num_state_slots} slots of {show_bytes(self.state_bytes)}, "
            f"{self.num_state_slots - self.max_num_seqs} of them for snapshots that prompts are found to begin with"
        )
        computed = [f"device: {self.device_name or self.device}, attention {self.attention_backend}"]
        each = f" of each of {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        return [
            *(computed if self.attention_backend != "cpu" else []),
            f"memory{each}: {show_bytes(self.total)} of {show_bytes(self.available)} available = "
            f"weights {show_bytes(self.weights)} ({self.quantization or self.stored or self.dtype}) "
            f"+ activations {show_bytes(self.activations)} ({self.max_num_batched_tokens} tokens a step) "
            f"+ log-probabilities {show_bytes(self.logprobs)} "
            f"+ KV cache {show_bytes(self.kv_cache)} ({self.kv_cache_dtype})"
            + (f" + recurrent states {show_bytes(self.states)}" if self.states else "")
            + (f" + adapters {show_bytes(self.adapters)}" if self.adapters else "")
            + (f" + images {show_bytes(self.images.num_bytes)}" if self.images.num_bytes else "")
            + (f" + CUDA context {show_bytes(self.context)}" if self.context else "")
            + (f" + CUDA graphs {show_bytes(self.graphs)}" if self.graphs else "")
            + (", of the host" if self.device == "cuda" and self.swap_space + self.staging else "")
            + (f" + swap space {show_bytes(self.swap_space)}" if self.swap_space else "")
            + (f" + staging {show_bytes(self.staging)} for the disk tier" if self.staging else ""),
            f"KV cache: {self.num_blocks} blocks of {self.block_size} tokens {self._describe_blocks()}; "
            f"longest context {self.max_model_len} tokens, {longest} sequence{'s' * (longest != 1)} of it fit, "
            f"at most {self.max_num_seqs} run at once",
            *([states] if self.states else []),
            *([self._describe_images()] if self.images.kept_tokens else []),
        ]

    def _describe_images(self) -> str:
        images = self.images
        most = images.tokens_per_image
        return (
            f"images: up to {most} tokens each ({show_bytes(most * self.kv_bytes_per_token)} of KV), "
            f"{self.max_model_len // most} in the longest context; {self.num_image_users} users with such an image and "
            f"{TEXT_TOKENS} tokens of text fit at once; the encoder takes {show_bytes(images.weights)} of the weights "
            f"and {show_bytes(images.num_bytes)} for what it computes and keeps ({images.kept_tokens} tokens)"
        )

    def _describe_blocks(self) -> str:
        """What the blocks are worth: tokens, or where there are windows, how many blocks a sequence needs."""
        if all(not group.window for group in self.kv_groups):
            return f"= {self.num_blocks * self.block_size} tokens of {show_bytes(self.kv_bytes_per_token)}"
        groups = describe_groups(self.kv_groups)
        return f"for {groups}; the longest sequence needs {self.longest_blocks} of them"

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "total": self.total,
            "states": self.states,
            "num_longest_sequences": self.num_longest_sequences,
            "num_image_users": self.num_image_users,
        }


def plan_memory(
    config: EngineConfig, model: ModelConfig, available: int | None = None, *, device: Device | None = None
) -> MemoryPlan:
    """Decide every size, in memory of `available` bytes (by default what the host has available).

    Raises `MemoryPlanError` for a plan that cannot fit, `ConfigError` for options that contradict each other. A card's
    plan follows from its size alone, never from what other processes have taken of it at this moment.
    """
    device = device or find_device(config.device)
    config = with_packed_form(config, model)
    check_devices(config.num_ranks, device)
    host = available_memory() if available is None else available
    plans = [_plan_part(config, part, host, device) for part in parts(config, model)]
    # One scheduler plans for the pools of all ranks, so the smallest decides.
    return replace(
        min(plans, key=lambda plan: (plan.num_blocks, -plan.kv_cache)),
        max_num_seqs=min(plan.max_num_seqs for plan in plans),
        num_state_slots=min(plan.num_state_slots for plan in plans),
    )


def _plan_part(config: EngineConfig, model: ModelConfig, host: int, device: Device) -> MemoryPlan:
    """The plan of one rank, which holds `model`, on a machine of `host` bytes."""
    num_ranks = config.num_ranks
    longest = config.max_model_len or model.default_model_len
    if model.needs_whole_texts:
        longest = check_whole_texts(config, model, longest)
    choice = _choose_storage(config, model, device, longest)
    check_packed_form(model, choice.backend)
    check_backend(config, choice, device)
    on_card = device.total_memory is not None
    available = int((device.total_memory or 0) * config.gpu_memory_utilization) if on_card else host // num_ranks
    budget = make_budget(config, model, choice, device, available)
    block_size = choice.block_size
    check_parts(config, model, budget, block_size, host)
    check_model_fits(config, model, choice, budget, device)
    check_context(config, model)
    share = 1.0 if on_card else KV_SHARE
    states = plan_states(config, model, budget, share)
    budget = replace(budget, states=states.num_bytes)
    num_blocks = _count_blocks(config, model, choice, budget, states, longest, share)
    alignment = window_alignment(block_size, batch_invariant=config.deterministic)
    check_pool(config, budget, num_blocks, block_size, alignment)
    max_model_len = budget.layout.longest(num_blocks, longest, block_size, alignment)
    return MemoryPlan(
        device=device.type,
        device_name=device.name,
        attention_backend=choice.backend,
        dtype=choice.dtype,
        quantization=choice.quantization,
        stored=_describe_stored(model, choice),
        kv_cache_dtype=choice.kv_cache_dtype,
        available=available,
        weights=budget.weights,
        activations=budget.activations,
        logprobs=budget.logprobs,
        kv_cache=num_blocks * budget.block,
        kv_bytes_per_token=budget.block * len(budget.layout.groups) // block_size,
        kv_groups=budget.layout.groups,
        block_size=block_size,
        num_blocks=num_blocks,
        longest_blocks=budget.layout.most_blocks(max_model_len, block_size, alignment),
        max_model_len=max_model_len,
        max_num_seqs=states.max_num_seqs,
        max_num_batched_tokens=choice.max_num_batched_tokens,
        swap_space=budget.swap_space,
        staging=budget.staging,
        context=budget.context,
        graphs=budget.graphs,
        num_state_slots=states.num_slots,
        state_bytes=states.slot_bytes,
        adapters=budget.adapters,
        images=budget.images,
        async_scheduling=num_ranks == 1 and device.type == "cuda"
        if config.async_scheduling is None
        else config.async_scheduling,
        num_ranks=num_ranks,
    )


def _count_blocks(
    config: EngineConfig,
    model: ModelConfig,
    choice: StorageChoice,
    budget: MemoryBudget,
    states: StateMemory,
    longest: int,
    share: float,
) -> int:
    """Blocks of the pool: as asked for, else as many as `share` of the memory left holds and sequences could fill."""
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory // budget.block
    # All sequences at full length could never fill more, with the blocks that they give back.
    useful = states.max_num_seqs * -(-longest // choice.block_size)
    if model.is_encoder:  # nothing outlives a step, and admission leaves some blocks free
        useful = (choice.max_num_batched_tokens // choice.block_size + states.max_num_seqs) * 17 // 16 + 1
    useful *= len(budget.layout.groups)
    return min(int((budget.left + states.num_bytes) * share - states.num_bytes) // budget.block, useful)


def _describe_stored(model: ModelConfig, choice: StorageChoice) -> str:
    """How a checkpoint of few bits is held, for the lines at start; "" for one of floats. Raises `ConfigError` where it
    would be quantised again."""
    if model.stored is None:
        return ""
    if choice.quantization is not None:
        raise ConfigError(
            f"quantization is {choice.quantization}, but the checkpoint's layers are already stored in few bits "
            f"({model.stored.describe()}); leave it out"
        )
    kept = BACKENDS[choice.backend].keeps_codes
    return model.stored.describe() if kept else f"{choice.dtype}, unpacked from {model.stored.describe()}"


def _choose_storage(config: EngineConfig, model: ModelConfig, device: Device, longest: int) -> StorageChoice:
    name = choose_backend(
        config.attention_backend,
        device.type,
        device.capability,
        has_package=has_package if device.is_here else lambda package: True,
        needs=model.attention_needs,
    )
    dtype = _dtype(config, model, device)
    min_batched = MIN_BATCHED_TOKENS if device.total_memory is None else MIN_BATCHED_TOKENS_ON_GPU
    if model.is_encoder:
        min_batched = max(min_batched, MIN_BATCHED_TOKENS_OF_ENCODER)
    if model.needs_whole_texts:
        min_batched = max(min_batched, longest)
    least = check_whole_images(config, model)
    return StorageChoice(
        backend=name,
        dtype=dtype,
        quantization=config.quantization,
        kv_cache_dtype=_kv_cache_dtype(config, dtype, BACKENDS[name], device),
        block_size=config.block_size or BACKENDS[name].block_size,
        max_num_batched_tokens=config.max_num_batched_tokens or max(min_batched, least),
    )


def _dtype(config: EngineConfig, model: ModelConfig, device: Device) -> str:
    if config.dtype != "auto":
        return config.dtype
    # Cards before Ampere compute in float16 but not in bfloat16.
    if device.type == "cuda" and device.capability < (8, 0) and model.checkpoint_dtype == "bfloat16":
        return "float16"
    return model.checkpoint_dtype


def _kv_cache_dtype(config: EngineConfig, dtype: str, backend: Backend, device: Device) -> str:
    """The type asked for; by default that of the activations.

    Where activations are always float32, it is float32 beside float32 weights, where fewer bits change tokens, and 16
    bits beside all others, whose own rounding is larger (docs/decisions/0016).
    """
    if config.kv_cache_dtype != "auto":
        return config.kv_cache_dtype
    if not backend.float32_activations:
        return dtype
    if config.quantization is None and dtype != "bfloat16":
        return dtype
    return "bfloat16" if device.multiplies_bfloat16 else "float16"
