"""gpt-oss: attention sinks, windows in every other layer, and experts with biases and a clamped gate."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.kernels.block_matrix import BlockWeight
from quire.kernels.interface import MXFP4_BLOCK, Mxfp4Matrix
from quire.layers.experts import ExpertLinear
from quire.models.builder import Builder
from quire.models.decoder import MLP
from quire.models.experts import Experts
from quire.models.moe import ExpertNames, MoELlama, take_experts
from quire.models.routers import make_router
from quire.models.weights import WeightScope

logger = logging.getLogger(__name__)


class GptOss(MoELlama):
    """Llama's names around experts that are stored all in one tensor, in 16 bits or as MXFP4."""

    def make_mlp(self, build: Builder, index: int) -> MLP:
        config, block = build.config, build.scope("mlp")
        hidden, inner = config.hidden_size, config.expert_intermediate_size
        logits = block.weights.take_linear("router", (config.num_experts, hidden), bias=True)
        if config.mxfp4_experts or block.weights.has("experts.gate_up_proj"):
            # Rows of gate and up lie in turns.
            order = torch.arange(2 * inner).view(-1, 2).t().flatten()
            layers = _take(block, "gate_up_proj", 2 * inner, hidden, order), _take(block, "down_proj", hidden, inner)
        else:
            layers = take_experts(block, ExpertNames(), bias=True)  # of GGUF
        experts = build.pack_experts(*layers, "clamped_swiglu")
        if config.mxfp4_experts and index == 0 and not isinstance(experts.packed.gate_up, BlockWeight):
            logger.warning("these kernels do not multiply MXFP4: experts are unpacked and stored as %s", build.dtype)
        return Experts(block.pack(logits, quantizes=False), make_router(config, block.weights.scope("router")), experts)


def _take(
    build: Builder, name: str, num_outputs: int, num_inputs: int, order: Tensor | slice = slice(None)
) -> ExpertLinear:
    """The layer `name` of all experts, its outputs in the order `order`."""
    weights, num_experts = build.weights.scope("experts"), build.config.num_experts
    bias = weights.take(f"{name}_bias", (num_experts, num_outputs))[:, order]
    if build.config.mxfp4_experts:
        return ExpertLinear(_take_mxfp4(weights, name, (num_experts, num_outputs, num_inputs), order), bias)
    stored = weights.take(name, (num_experts, num_inputs, num_outputs))
    return ExpertLinear([[matrix.t()[order]] for matrix in stored], bias)


def _take_mxfp4(
    weights: WeightScope, name: str, shape: tuple[int, int, int], order: Tensor | slice
) -> Sequence[Sequence[Mxfp4Matrix]]:
    num_experts, num_outputs, num_inputs = shape
    if num_inputs % MXFP4_BLOCK:
        raise CheckpointError(
            f"tensor {weights.prefix}{name}_blocks: MXFP4 has blocks of {MXFP4_BLOCK} numbers, and an expert's input "
            f"of {num_inputs} by config.json is no multiple of that"
        )
    num_blocks = num_inputs // MXFP4_BLOCK
    blocks = weights.take_bytes(f"{name}_blocks", (num_experts, num_outputs, num_blocks, MXFP4_BLOCK // 2))
    scales = weights.take_bytes(f"{name}_scales", (num_experts, num_outputs, num_blocks))
    return [[Mxfp4Matrix(each[order], scale[order])] for each, scale in zip(blocks, scales, strict=True)]
