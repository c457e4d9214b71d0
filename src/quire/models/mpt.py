"""MPT: ALiBi in the place of positions, LayerNorms without bias, no biases, and limits of queries, keys and values."""

from torch import Tensor

from quire.models.blocks import fused_attention, plain_mlp
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import DecoderNames, Llama


class MPT(Llama):
    """Queries, keys and values are one matrix."""

    names = DecoderNames("transformer", "wte", "blocks", "norm_f")

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return DecoderLayer(
            build.norm("norm_1"),
            fused_attention(build.scope("attn"), index, names=("Wqkv", "out_proj")),
            build.norm("norm_2"),
            plain_mlp(build.scope("ffn"), ("up_proj", "down_proj")),
        )
