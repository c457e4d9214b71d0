"""StarCoder2: LayerNorms with bias, a plain MLP, and a sliding window and biases as the config says."""

from torch import Tensor

from quire.models.blocks import plain_mlp, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import Llama


class StarCoder2(Llama):
    """Llama's names, but the MLP is `c_fc` and `c_proj`."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(build.scope("self_attn"), index, cos_sin),
            build.norm("post_attention_layernorm"),
            plain_mlp(build.scope("mlp"), ("c_fc", "c_proj")),
        )
