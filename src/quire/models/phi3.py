"""Phi-3 and Phi-4: Llama with queries, keys and values stored as one matrix, and gate and up as another."""

from torch import Tensor

from quire.models.blocks import fused_attention, fused_gated_mlp
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import Llama


class Phi3(Llama):
    """Llama's names, but `qkv_proj` and `gate_up_proj`."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return DecoderLayer(
            build.norm("input_layernorm"),
            fused_attention(build.scope("self_attn"), index, names=("qkv_proj", "o_proj"), cos_sin=cos_sin),
            build.norm("post_attention_layernorm"),
            fused_gated_mlp(build.scope("mlp"), build.config.intermediate_size),
        )
