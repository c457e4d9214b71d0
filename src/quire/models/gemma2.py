"""Gemma 2 and 3: norms before and after each half of a layer. Soft-caps, norms of queries and keys, the windows of
layers and their rotary embeddings, the factor of the embeddings and the offset of the norms follow from the config."""

from torch import Tensor

from quire.models.blocks import gated_mlp, rms_head_norms, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import Llama


class Gemma2(Llama):
    """Llama's names, but `post_attention_layernorm` norms what attention computes."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        attention = build.scope("self_attn")
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(attention, index, cos_sin, head_norms=rms_head_norms(attention)),
            build.norm("pre_feedforward_layernorm"),
            gated_mlp(build.scope("mlp"), build.config.intermediate_size),
            post_norms=(build.norm("post_attention_layernorm"), build.norm("post_feedforward_layernorm")),
        )
