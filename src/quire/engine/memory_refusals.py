"""Why a memory plan is refused: each refusal names the value seen, the limit, and what would be accepted.

`ConfigError` is raised for options that contradict each other or the backend, `MemoryPlanError` for what does not fit.
"""

from dataclasses import replace

from quire.backends import BACKENDS
from quire.config import EngineConfig
from quire.dtypes import DTYPE_BYTES
from quire.engine.device import Device
from quire.engine.memory_budget import MemoryBudget, StorageChoice
from quire.engine.memory_sizes import show_bytes
from quire.errors import ConfigError, MemoryPlanError
from quire.model_config import ModelConfig
from quire.quantization import METHODS
from quire.step import logprob_bytes


def check_backend(config: EngineConfig, choice: StorageChoice, device: Device) -> None:
    """Refuse what the backend's kernels do not have."""
    name, backend = choice.backend, BACKENDS[choice.backend]
    kv_dtype = choice.kv_cache_dtype
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


def with_packed_form(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """The options with the quantisation that a folder of packed weights has. Raises `ConfigError` for another one."""
    if model.packed_as is None:
        return config
    if config.quantization not in (None, model.packed_as):
        raise ConfigError(
            f"quantization is {config.quantization}, but the folder holds weights packed as {model.packed_as}; leave "
            "it out, or serve the original"
        )
    if config.load_format == "dummy":
        raise ConfigError(
            "load_format is dummy, but the folder holds packed weights; leave it out, or give the original"
        )
    if config.num_ranks > 1:
        raise ConfigError(
            f"tensor_parallel_size times pipeline_parallel_size is {config.num_ranks}, but the folder holds packed "
            "weights, which cannot be divided; serve the original"
        )
    return replace(config, quantization=model.packed_as)


def check_packed_form(model: ModelConfig, backend: str) -> None:
    """Packed weights lie as the CPU's kernels read them."""
    if model.packed_as is not None and backend != "cpu":
        raise ConfigError(
            f"the folder holds weights packed for the kernels of the CPU, and the {backend} backend is chosen; leave "
            "attention_backend and device out, or serve the original"
        )


def check_parts(config: EngineConfig, model: ModelConfig, budget: MemoryBudget, block_size: int, host: int) -> None:
    """Refuse parts that are too small to use, and tiers larger than the `host` bytes of the host's memory."""
    if config.swap_space is not None and not budget.swap_space:
        raise MemoryPlanError(
            f"swap_space is {show_bytes(config.swap_space)}, less than one block of {block_size} tokens, "
            f"which takes {show_bytes(budget.block)}; give a size such as 4GiB"
        )
    position = logprob_bytes(model.vocab_size, config.max_logprobs)
    if budget.logprobs < position:
        raise MemoryPlanError(
            f"logprobs_memory is {show_bytes(budget.logprobs)}, but one position with max_logprobs "
            f"{config.max_logprobs} of a vocabulary of {model.vocab_size} tokens takes {show_bytes(position)}; "
            "give at least that"
        )
    if budget.own_memory and budget.tiers > host:
        raise MemoryPlanError(
            f"swap_space and staging take {show_bytes(budget.tiers)} of the host's memory, of which "
            f"{show_bytes(host)} is available; give less"
        )


def check_model_fits(
    config: EngineConfig, model: ModelConfig, choice: StorageChoice, budget: MemoryBudget, device: Device
) -> None:
    """Refuse a model beside which not one KV block fits."""
    if budget.left >= budget.block:
        return
    raise MemoryPlanError(
        f"the model does not fit: weights take {show_bytes(budget.weights)} as {choice.quantization or choice.dtype} "
        f"beside activations {show_bytes(budget.activations)} and log-probabilities {show_bytes(budget.logprobs)}, "
        + (f"tiers below the KV cache {show_bytes(budget.tiers)}, " if budget.tiers else "")
        + (f"CUDA context and graphs {show_bytes(budget.context + budget.graphs)}, " if budget.context else "")
        + f"but {show_bytes(budget.available)} are available"
        + (
            f", gpu_memory_utilization {config.gpu_memory_utilization:g} of {show_bytes(device.total_memory or 0)}"
            if budget.own_memory
            else ""
        )
        + _smaller_weights(model, choice, budget.available)
    )


def check_context(config: EngineConfig, model: ModelConfig) -> None:
    """Refuse a max_model_len beyond the positions that the model knows."""
    wanted = config.max_model_len
    if wanted and wanted > model.context_length:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model knows {model.context_length} positions; ask for at most that"
        )


def check_whole_images(config: EngineConfig, model: ModelConfig) -> int:
    """The least tokens of a step in which all sequences decode and an image is computed whole, where a model asks for
    that. Refuses a smaller `max_num_batched_tokens`."""
    num_tokens = model.tokens_of_whole_images if config.max_images else 0
    least, budget = config.max_num_seqs + num_tokens, config.max_num_batched_tokens
    if num_tokens and budget is not None and budget < least:
        raise ConfigError(
            f"max_num_batched_tokens is {budget}, but this model computes the {num_tokens} tokens of an image in one "
            f"step, beside {config.max_num_seqs} sequences (max_num_seqs); ask for at least {least}, or set max_images "
            "to 0"
        )
    return least


MAX_WHOLE_TEXT = 8192
"""The longest text, unless more is asked for, of a model that computes a text in one step: activations grow with it."""


def check_whole_texts(config: EngineConfig, model: ModelConfig, longest: int) -> int:
    """The longest text of a model that computes a text in one step. Refuses options that a step cannot hold, and
    tiers for an encoder, which keeps nothing."""
    budget = config.max_num_batched_tokens
    if config.max_model_len is not None and budget is not None and budget < config.max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens is {budget}, less than max_model_len {config.max_model_len}, but this model "
            "computes a text in one step; raise the one or lower the other"
        )
    for name in ("swap_space", "disk_cache"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name} is set, but a model that pools whole texts keeps no KV; leave it out")
    if config.enable_lora and model.is_encoder:
        raise ConfigError("enable_lora is set, but adapters of encoders are not supported; leave it out")
    if config.kv_cache_dtype == "fp8_e4m3" and model.is_encoder:
        raise ConfigError("kv_cache_dtype is fp8, but an encoder keeps no KV; leave it out")
    if config.max_model_len is None:
        longest = min(longest, budget or MAX_WHOLE_TEXT)
    return longest


def check_pool(
    config: EngineConfig, budget: MemoryBudget, num_blocks: int, block_size: int, window_alignment: int = 1
) -> None:
    """Refuse a KV pool without a block, larger than the memory left, or smaller than max_model_len."""
    block = budget.block
    if num_blocks < 1:
        raise MemoryPlanError(
            f"the KV cache has no room for one block of {block_size} tokens, "
            f"which takes {show_bytes(block)}; raise kv_cache_memory"
        )
    if num_blocks * block > budget.left:
        fitting = budget.left // block
        raise MemoryPlanError(
            f"{num_blocks} KV blocks take {show_bytes(num_blocks * block)}, but beside weights, activations "
            f"and log-probabilities {show_bytes(budget.left)} are left; {fitting} blocks "
            f"({show_bytes(fitting * block)}) would fit"
        )
    if config.max_model_len is None:
        return
    layout = budget.layout
    longest = layout.most_blocks(config.max_model_len, block_size, window_alignment)
    if longest > num_blocks:
        fitting = layout.longest(num_blocks, config.max_model_len, block_size, window_alignment)
        raise MemoryPlanError(
            f"a sequence of max_model_len {config.max_model_len} tokens takes {show_bytes(longest * block)} of "
            f"KV cache, but the pool has {num_blocks} blocks of {block_size} tokens; "
            f"max_model_len {fitting} would fit, or "
            f"kv_cache_memory {show_bytes(longest * block)}"
        )


def _smaller_weights(model: ModelConfig, choice: StorageChoice, available: int) -> str:
    """Sizes of the weights in smaller formats that fit into `available` bytes, as the end of a sentence, or ""."""
    spec, dtype = model.spec, choice.dtype
    in_half = DTYPE_BYTES[dtype] > 2 and choice.quantization is None
    choices = {"float16": spec.weight_bytes("float16")} if in_half else {}
    choices |= {f"quantization {name}": spec.weight_bytes(dtype, name) for name in METHODS}
    now = spec.weight_bytes(dtype, choice.quantization)
    fitting = [
        f"as {name} the weights take {show_bytes(size)}" for name, size in choices.items() if size < min(now, available)
    ]
    return "; " + ", ".join(fitting) if fitting else ""
