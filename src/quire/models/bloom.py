"""BLOOM: ALiBi in the place of positions, a norm of the embeddings, LayerNorms and biases everywhere."""

from torch import Tensor

from quire.models.blocks import fused_attention, plain_mlp
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import DecoderNames, Llama


class Bloom(Llama):
    """Queries, keys and values are one matrix with the rows of each head together."""

    names = DecoderNames("transformer", "word_embeddings", "h", "ln_f", embedding_norm="word_embeddings_layernorm")

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return DecoderLayer(
            build.norm("input_layernorm"),
            fused_attention(build.scope("self_attention"), index, by_kv_head=True),
            build.norm("post_attention_layernorm"),
            plain_mlp(build.scope("mlp"), ("dense_h_to_4h", "dense_4h_to_h")),
        )
