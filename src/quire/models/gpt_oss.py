"""gpt-oss: attention sinks, windows in every other layer, and experts with biases and a clamped gate."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.layers.linear import LinearWeight
from quire.models import mxfp4
from quire.models.blocks import GatedMLP
from quire.models.builder import Builder
from quire.models.decoder import MLP
from quire.models.experts import Experts
from quire.models.moe import MoELlama
from quire.models.routers import make_router
from quire.models.weights import WeightScope

logger = logging.getLogger(__name__)


class GptOss(MoELlama):
    """Llama's names around experts that are stored all in one tensor, in 16 bits or as MXFP4."""

    def make_mlp(self, build: Builder, index: int) -> MLP:
        config, block = build.config, build.scope("mlp")
        experts = block.weights.scope("experts")
        hidden, inner = config.hidden_size, config.expert_intermediate_size
        if index == 0 and _is_packed(experts, "gate_up_proj"):
            logger.warning("the experts of this checkpoint are MXFP4; they are unpacked and stored as %s", build.dtype)
        logits = block.weights.take_linear("router", (config.num_experts, hidden), bias=True)
        gate_ups = _expert_layers(experts, "gate_up_proj", (config.num_experts, 2 * inner, hidden))
        downs = _expert_layers(experts, "down_proj", (config.num_experts, hidden, inner))
        # Rows of gate and up lie in turns.
        order = torch.arange(2 * inner).view(-1, 2).t().flatten()
        return Experts(
            block.pack(logits, quantizes=False),
            make_router(config, block.weights.scope("router")),
            [
                GatedMLP(build.pack(gate_up.select_rows(order)), build.pack(down), config.gate or config.activation)
                for gate_up, down in zip(gate_ups, downs, strict=True)
            ],
        )


def _is_packed(weights: WeightScope, name: str) -> bool:
    return weights.has(f"{name}_blocks")


def _expert_layers(weights: WeightScope, name: str, shape: tuple[int, int, int]) -> Iterator[LinearWeight]:
    """The layer `name` of every expert; `shape` is [experts, outputs, inputs]."""
    biases = weights.take(f"{name}_bias", shape[:2])
    for matrix, bias in zip(_matrices(weights, name, shape), biases, strict=True):
        yield LinearWeight(matrix, bias)


def _matrices(weights: WeightScope, name: str, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """[outputs, inputs] of every expert, one at a time, so that no copy of all is held."""
    num_experts, num_outputs, num_inputs = shape
    if not _is_packed(weights, name):
        for stored in weights.take(name, (num_experts, num_inputs, num_outputs)):
            yield stored.t()
        return
    if num_inputs % mxfp4.BLOCK:
        raise CheckpointError(
            f"tensor {weights.prefix}{name}_blocks: MXFP4 has blocks of {mxfp4.BLOCK} numbers, and an expert's input "
            f"of {num_inputs} by config.json is no multiple of that"
        )
    num_blocks = num_inputs // mxfp4.BLOCK
    blocks = weights.take_bytes(f"{name}_blocks", (num_experts, num_outputs, num_blocks, mxfp4.BLOCK // 2))
    scales = weights.take_bytes(f"{name}_scales", (num_experts, num_outputs, num_blocks))
    for packed, scale in zip(blocks, scales, strict=True):
        yield mxfp4.unpack(packed, scale)
