"""divide: the config of one rank's part of a model, where several ranks hold it together (tensor parallelism).

Heads and inner widths are divided, so every size that follows from them (`ModelConfig.spec`) is one rank's. Where there
are fewer KV heads than ranks, several ranks hold the same one. `vocab_size` stays that of the whole model.
"""

from dataclasses import replace

from quire.errors import ConfigError
from quire.model_config.architectures import ARCHITECTURES
from quire.model_config.model_config import ModelConfig

_UNDIVIDED = {"GptOssForCausalLM": "experts whose gates and inputs take turns in the rows of MXFP4"}
"""Architectures whose weights no rank can take a part of, and what is in the way."""


def kv_copies(model: ModelConfig, num_ranks: int) -> int:
    """How many ranks hold the same KV heads of a whole model."""
    return max(1, num_ranks // model.num_kv_heads)


def divide(model: ModelConfig, num_ranks: int, rank: int = 0) -> ModelConfig:
    """The part of `rank` of a whole model. Raises `ConfigError` for a model that cannot be divided by this number."""
    if num_ranks == 1:
        return model
    _check_kind(model, num_ranks)
    _check_sizes(model, num_ranks)
    heads = model.num_heads // num_ranks
    return replace(
        model,
        num_ranks=num_ranks,
        num_heads=heads,
        num_kv_heads=max(1, model.num_kv_heads // num_ranks),
        intermediate_size=model.intermediate_size // num_ranks,
        expert_intermediate_size=model.expert_intermediate_size // num_ranks,
        shared_expert_intermediate_size=model.shared_expert_intermediate_size // num_ranks,
        alibi_slopes=model.alibi_slopes[rank * heads : (rank + 1) * heads],
        block_bytes=-(-model.block_bytes // num_ranks),
        kept=None,  # what the bits of a part take is counted as floats
    )


def _check_kind(model: ModelConfig, num_ranks: int) -> None:
    in_the_way = {
        "a model that transformers computes": bool(model.computed_by) or model.architecture not in ARCHITECTURES,
        "an encoder": model.is_encoder,
        "recurrent layers": model.recurrent is not None,
        "an image encoder": model.vision is not None,
        "one norm for the queries of all heads": model.qk_norm_joint,
        "a norm with weights for every head": model.qk_norm_per_head,
    }
    reasons = [what for what, found in in_the_way.items() if found]
    if model.architecture in _UNDIVIDED:
        reasons.append(_UNDIVIDED[model.architecture])
    if reasons:
        raise ConfigError(
            f"tensor_parallel_size is {num_ranks}, but {model.architecture} has {', '.join(reasons)}, which Quire "
            "cannot divide; leave it out, or use data_parallel_size"
        )


def _check_sizes(model: ModelConfig, num_ranks: int) -> None:
    divided = {
        "attention heads": model.num_heads,
        "inner width": model.intermediate_size,
        "inner width of an expert": model.expert_intermediate_size,
        "inner width of the shared expert": model.shared_expert_intermediate_size,
    }
    for what, size in divided.items():
        if size % num_ranks:
            raise ConfigError(f"tensor_parallel_size is {num_ranks}, which does not divide the model's {what}, {size}")
    num_kv_heads = model.num_kv_heads
    if num_kv_heads % num_ranks and num_ranks % num_kv_heads:
        raise ConfigError(
            f"tensor_parallel_size is {num_ranks}, which neither divides the model's KV heads, {num_kv_heads}, nor is "
            "a multiple of them"
        )
    if model.vocab_size <= (num_ranks - 1) * -(-model.vocab_size // num_ranks):
        raise ConfigError(f"tensor_parallel_size is {num_ranks}, too many for a vocabulary of {model.vocab_size}")
