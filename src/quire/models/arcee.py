"""Arcee: Llama whose MLP has no gate and squares what a ReLU leaves."""

from torch import Tensor

from quire.models.blocks import plain_mlp, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import Llama


class Arcee(Llama):
    """Llama's names without `gate_proj`."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(build.scope("self_attn"), index, cos_sin),
            build.norm("post_attention_layernorm"),
            plain_mlp(build.scope("mlp"), ("up_proj", "down_proj")),
        )
