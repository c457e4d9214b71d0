"""gpt-oss: attention sinks, windows in every other layer, and experts with biases and a clamped gate."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.kernels.interface import MXFP4_BLOCK, Mxfp4Matrix
from quire.layers.experts import ExpertLinear
from quire.models.builder import Builder
from quire.models.decoder import MLP
from quire.models.experts import Experts
from quire.models.moe import MoELlama
from quire.models.routers import make_router
from quire.models.weights import WeightScope


class GptOss(MoELlama):
    """Llama's names around experts that are stored all in one tensor, in 16 bits or as MXFP4, which keep their bits."""

    def make_mlp(self, build: Builder, index: int) -> MLP:
        config, block = build.config, build.scope("mlp")
        experts = block.weights.scope("experts")
        hidden, inner = config.hidden_size, config.expert_intermediate_size
        logits = block.weights.take_linear("router", (config.num_experts, hidden), bias=True)
        # Rows of gate and up lie in turns.
        turns = (slice(0, None, 2), slice(1, None, 2))
        return Experts(
            block.pack(logits, quantizes=False),
            make_router(config, block.weights.scope("router")),
            build.pack_experts(
                _expert_linear(experts, "gate_up_proj", (config.num_experts, 2 * inner, hidden), turns),
                _expert_linear(experts, "down_proj", (config.num_experts, hidden, inner), (slice(None),)),
            ),
        )


def _expert_linear(
    weights: WeightScope, name: str, shape: tuple[int, int, int], parts: Sequence[slice]
) -> ExpertLinear:
    """The layer `name` of every expert, as views of the checkpoint; `shape` is [experts, outputs, inputs]. `parts` are
    the stored outputs in the order of computation."""
    stored = weights.take(f"{name}_bias", shape[:2])
    bias = torch.cat([stored[:, part] for part in parts], dim=1)
    if not weights.has(f"{name}_blocks"):
        num_experts, num_outputs, num_inputs = shape
        floats = weights.take(name, (num_experts, num_inputs, num_outputs))
        return ExpertLinear([[each.t()[part] for part in parts] for each in floats], bias)
    blocks, scales = _mxfp4(weights, name, shape)
    return ExpertLinear(
        [
            [Mxfp4Matrix(block[part], scale[part]) for part in parts]
            for block, scale in zip(blocks, scales, strict=True)
        ],
        bias,
    )


def _mxfp4(weights: WeightScope, name: str, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Blocks [experts, outputs, inputs / 32, 16] and scales [experts, outputs, inputs / 32]."""
    num_experts, num_outputs, num_inputs = shape
    if num_inputs % MXFP4_BLOCK:
        raise CheckpointError(
            f"tensor {weights.prefix}{name}_blocks: MXFP4 has blocks of {MXFP4_BLOCK} numbers, and an expert's input "
            f"of {num_inputs} by config.json is no multiple of that"
        )
    num_blocks = num_inputs // MXFP4_BLOCK
    blocks = weights.take_bytes(f"{name}_blocks", (num_experts, num_outputs, num_blocks, MXFP4_BLOCK // 2))
    return blocks, weights.take_bytes(f"{name}_scales", (num_experts, num_outputs, num_blocks))
