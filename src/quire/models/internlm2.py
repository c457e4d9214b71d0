"""InternLM 2: Llama in other names, with queries, keys and values stored as one matrix, KV head by KV head."""

from torch import Tensor

from quire.models.blocks import fused_attention, gated_mlp
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import DecoderNames, Llama


class InternLM2(Llama):
    """`wqkv` holds the queries of a KV head, then its key and its value; `w1`, `w3` and `w2` are gate, up and down."""

    names = DecoderNames(embedding="tok_embeddings", heads=("output",))
    ignored_tensors = (r"^output\.weight$",)

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return DecoderLayer(
            build.norm("attention_norm"),
            fused_attention(build.scope("attention"), index, names=("wqkv", "wo"), cos_sin=cos_sin, by_kv_head=True),
            build.norm("ffn_norm"),
            gated_mlp(build.scope("feed_forward"), build.config.intermediate_size, names=("w1", "w3", "w2")),
        )
