"""GLM-4 in its two forms: biases of queries, keys and values, rotation of adjacent pairs in half of each head, and gate
and up stored as one matrix. The later form has norms after each half of a layer as well."""

from torch import Tensor

from quire.models.blocks import fused_gated_mlp, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import Llama


class Glm(Llama):
    """Llama's names, but `gate_up_proj`; post-norms are `post_self_attn_layernorm` and `post_mlp_layernorm`."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        post_norms = None
        if build.config.post_norms:
            post_norms = build.norm("post_self_attn_layernorm"), build.norm("post_mlp_layernorm")
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(build.scope("self_attn"), index, cos_sin),
            build.norm("post_attention_layernorm"),
            fused_gated_mlp(build.scope("mlp"), build.config.intermediate_size),
            post_norms=post_norms,
        )
