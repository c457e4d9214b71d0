"""Phi 1, 1.5 and 2: attention and MLP read one LayerNorm, a part of each head is rotated, and every dense layer has a
bias, the output head too."""

from torch import Tensor

from quire.layers.norm import LayerHeadNorm
from quire.models.blocks import HeadNorms, plain_mlp, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import DecoderNames, Llama


class Phi(Llama):
    """The layers follow from the config; the names are nearly Llama's."""

    names = DecoderNames(norm="final_layernorm")

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        attention = build.scope("self_attn")
        names = ("q_proj", "k_proj", "v_proj", "dense")
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(attention, index, cos_sin, names=names, head_norms=_head_norms(attention)),
            None,
            plain_mlp(build.scope("mlp"), ("fc1", "fc2")),
        )


def _head_norms(build: Builder) -> HeadNorms | None:
    """LayerNorms of queries and of keys, one weight and one bias for all heads."""
    config, dtype = build.config, build.weights.activation_dtype
    if not config.qk_norm:
        return None

    def norm(name: str) -> LayerHeadNorm:
        weight, bias = (build.weights.take(f"{name}.{part}", (config.head_dim,)) for part in ("weight", "bias"))
        return LayerHeadNorm(weight[None].to(dtype), config.norm_eps, bias[None].to(dtype))

    return norm("q_layernorm"), norm("k_layernorm")
