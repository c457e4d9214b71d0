"""OLMo 2 and EXAONE 4: norms of what each half of a layer computes and none of what it reads. OLMo 2 norms queries and
keys over all heads together, EXAONE 4 each head."""

from torch import Tensor

from quire.layers.norm import JointHeadNorm, NoNorm
from quire.models.blocks import HeadNorms, gated_mlp, rms_head_norms, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import Llama


class OLMo2(Llama):
    """Llama's names, but `post_attention_layernorm` norms what attention computes."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        attention = build.scope("self_attn")
        head_norms = _joint_head_norms(attention) if build.config.qk_norm_joint else rms_head_norms(attention)
        return DecoderLayer(
            NoNorm(),
            rotary_attention(attention, index, cos_sin, head_norms=head_norms),
            NoNorm(),
            gated_mlp(build.scope("mlp"), build.config.intermediate_size),
            post_norms=(build.norm("post_attention_layernorm"), build.norm("post_feedforward_layernorm")),
        )


def _joint_head_norms(build: Builder) -> HeadNorms:
    config = build.config

    def norm(name: str, num_heads: int) -> JointHeadNorm:
        weight = build.weights.take(f"{name}.weight", (num_heads * config.head_dim,)).float()
        return JointHeadNorm(build.kernels, weight, config.norm_eps, config.head_dim)

    return norm("q_norm", config.num_heads), norm("k_norm", config.num_kv_heads)
