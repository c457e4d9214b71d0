"""Mixtral: Llama with experts in the place of the MLP."""

from torch import Tensor

from quire.layers.linear import LinearWeight
from quire.models.blocks import GatedMLP, gated_mlp, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.experts import Experts
from quire.models.llama import Llama


class Mixtral(Llama):
    """Llama's names. Experts are stored one by one below `block_sparse_moe`, or all in one tensor below `mlp`."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        fused = build.weights.has("mlp.experts.gate_up_proj")
        moe = build.scope("mlp" if fused else "block_sparse_moe")
        config, hidden = build.config, build.config.hidden_size
        router = moe.weights.take_linear("gate", (config.num_experts, hidden))
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(build.scope("self_attn"), index, cos_sin),
            build.norm("post_attention_layernorm"),
            Experts(
                build.pack(router, quantizes=False),
                _fused_experts(moe) if fused else _experts(moe),
                config.num_experts_per_token,
                normalise=config.norm_topk,
            ),
        )


def _experts(build: Builder) -> list[GatedMLP]:
    return [
        gated_mlp(build.scope(f"experts.{index}"), build.config.expert_intermediate_size, names=("w1", "w3", "w2"))
        for index in range(build.config.num_experts)
    ]


def _fused_experts(build: Builder) -> list[GatedMLP]:
    """The experts of tensors [experts, outputs, inputs], the rows of gate above those of up."""
    config = build.config
    hidden, inner, num_experts = config.hidden_size, config.expert_intermediate_size, config.num_experts
    gate_up = build.weights.take("experts.gate_up_proj", (num_experts, 2 * inner, hidden))
    down = build.weights.take("experts.down_proj", (num_experts, hidden, inner))
    return [
        GatedMLP(build.pack(LinearWeight(first)), build.pack(LinearWeight(second)), config.activation)
        for first, second in zip(gate_up, down, strict=True)
    ]
