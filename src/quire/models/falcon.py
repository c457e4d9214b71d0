"""Falcon: one KV head or few, and a parallel residual with one norm (7B) or two (40B); or ALiBi, biases and a residual
that is not parallel (RW)."""

from torch import Tensor

from quire.models.blocks import fused_attention, plain_mlp
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import DecoderNames, Llama


class Falcon(Llama):
    """Queries, keys and values are one matrix with the rows of each KV head together."""

    names = DecoderNames("transformer", "word_embeddings", "h", "ln_f")

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        config, attention = build.config, build.scope("self_attention")
        attend = fused_attention(attention, index, cos_sin=cos_sin, by_kv_head=True)
        mlp = plain_mlp(build.scope("mlp"), ("dense_h_to_4h", "dense_4h_to_h"))
        if config.parallel_mlp_norm:
            return DecoderLayer(build.norm("ln_attn"), attend, build.norm("ln_mlp"), mlp, parallel_residual=True)
        mlp_norm = None if config.parallel_residual else build.norm("post_attention_layernorm")
        return DecoderLayer(build.norm("input_layernorm"), attend, mlp_norm, mlp)
