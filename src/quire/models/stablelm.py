"""StableLM: LayerNorms with bias, rotation of a part of each head, a parallel residual and a norm for each head as the
config says."""

import torch
from torch import Tensor

from quire.layers.norm import LayerHeadNorm
from quire.models.blocks import HeadNorms, gated_mlp, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import Llama


class StableLM(Llama):
    """Llama's names. A layer with a parallel residual has no second norm."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        attention = build.scope("self_attn")
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(attention, index, cos_sin, head_norms=_head_norms(attention)),
            None if build.config.parallel_residual else build.norm("post_attention_layernorm"),
            gated_mlp(build.scope("mlp"), build.config.intermediate_size),
        )


def _head_norms(build: Builder) -> HeadNorms | None:
    """LayerNorms of queries and keys, stored one tensor a head."""
    config = build.config
    if not config.qk_norm:
        return None

    def norm(name: str, num_heads: int) -> LayerHeadNorm:
        take, shape = build.scope(name).weights.take, (config.head_dim,)
        weights = [take(f"norms.{head}.weight", shape) for head in range(num_heads)]
        return LayerHeadNorm(torch.stack(weights).to(build.weights.activation_dtype), config.norm_eps)

    return norm("q_layernorm", config.num_heads), norm("k_layernorm", config.num_kv_heads)
