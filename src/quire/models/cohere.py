"""Cohere's Command models: LayerNorms without bias, a parallel residual, and a norm for each head as the config says.

Rotation of adjacent pairs, the factor of the logits, and windows follow from the config; so do the layers of the second
generation that attend to all positions and rotate nothing.
"""

from torch import Tensor

from quire.layers.norm import LayerHeadNorm
from quire.models.blocks import HeadNorms, gated_mlp, in_head_order, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import Llama


class Cohere(Llama):
    """Llama's names; a layer has one norm."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        attention = build.scope("self_attn")
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(attention, index, cos_sin, head_norms=_head_norms(attention)),
            None,
            gated_mlp(build.scope("mlp"), build.config.intermediate_size),
        )


def _head_norms(build: Builder) -> HeadNorms | None:
    """LayerNorms of queries and keys, the weights of all heads in one tensor."""
    config = build.config
    if not config.qk_norm:
        return None

    def norm(name: str, num_heads: int) -> LayerHeadNorm:
        weight = in_head_order(config, build.weights.take(f"{name}.weight", (num_heads, config.head_dim)))
        return LayerHeadNorm(weight.to(build.weights.activation_dtype), config.norm_eps)

    return norm("q_norm", config.num_heads), norm("k_norm", config.num_kv_heads)
