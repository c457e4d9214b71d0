"""OLMo 2 and EXAONE 4: norms of what each half of a layer computes and none of what it reads. OLMo 2 norms queries and
keys over all heads together, EXAONE 4 each head."""

from torch import Tensor

from quire.layers.norm import NoNorm
from quire.models.blocks import gated_mlp, rms_head_norms, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import Llama


class OLMo2(Llama):
    """Llama's names, but `post_attention_layernorm` norms what attention computes."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        attention = build.scope("self_attn")
        return DecoderLayer(
            NoNorm(),
            rotary_attention(attention, index, cos_sin, head_norms=rms_head_norms(attention)),
            NoNorm(),
            gated_mlp(build.scope("mlp"), build.config.intermediate_size),
            post_norms=(build.norm("post_attention_layernorm"), build.norm("post_feedforward_layernorm")),
        )
