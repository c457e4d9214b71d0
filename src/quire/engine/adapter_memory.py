"""adapter_memory: what the slots of adapters may take, computed before anything is loaded."""

from quire.config import EngineConfig
from quire.dtypes import DTYPE_BYTES
from quire.layer_spec import LinearSpec, ModelSpec
from quire.lora.adapter_folder import AdapterFolder
from quire.lora.registry import parse_module

_MOST_PARTS = {"qkv": 4, "in": 4, "per_head": 4}
"""Stored layers that one layer is packed from, each with an adapter of its own; of all others at most two."""


def adapter_memory(config: EngineConfig, spec: ModelSpec, dtype: str, num_tokens: int) -> int:
    """Bytes for `max_loras` adapters of `max_lora_rank` that change every layer, in `dtype`; for the whole weights that
    the adapters of `lora_modules` bring, where they bring most; and for the inputs of one layer, gathered from a step
    of `num_tokens`. Raises `ConfigError` and `CheckpointError`."""
    if not config.enable_lora:
        return 0
    dense = [linear for layer in spec.layers for linear in layer.dense]
    per_rank = sum(map(_elements_per_rank, (*dense, *spec.projections, spec.head, spec.embedding)))
    whole = sorted((_whole_elements(parse_module(module)[1]) for module in config.lora_modules), reverse=True)
    elements = config.max_loras * config.max_lora_rank * per_rank + sum(whole[: config.max_loras])
    elements += 3 * num_tokens * max(linear.num_inputs for linear in dense)  # a gate, what it multiplies, the product
    return elements * DTYPE_BYTES[dtype]


def _elements_per_rank(linear: LinearSpec) -> int:
    return linear.num_outputs + _MOST_PARTS.get(linear.name, 2) * linear.num_inputs


def _whole_elements(path: str) -> int:
    """Elements of the whole weights in an adapter's folder."""
    size = 0
    for module in AdapterFolder.open(path).modules.values():
        if module.weight is not None:
            rows, columns = (*module.weight.shape, 1)[:2]
            size += -(-rows // 32) * 32 * columns  # a packed weight has whole panels of outputs
    return size
