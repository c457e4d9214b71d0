"""Hunyuan, dense and with experts: Llama whose queries and keys are normed after they were rotated."""

from torch import Tensor

from quire.models.blocks import SelfAttention, gated_mlp, rms_head_norms, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import MLP, DecoderLayer
from quire.models.llama import Llama
from quire.models.moe import FUSED, ExpertNames, MoELlama

NORMS = ("query_layernorm", "key_layernorm")


class Hunyuan(Llama):
    """Llama's names around the norms."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return _layer(build, index, cos_sin, gated_mlp(build.scope("mlp"), build.config.intermediate_size))


class HunyuanMoE(MoELlama):
    """The same with experts in every layer, beside a network as wide as one of them."""

    layouts = (ExpertNames(router="gate.wg"), ExpertNames(router="gate.wg", fused=FUSED))
    shared = "shared_mlp"

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return _layer(build, index, cos_sin, self.make_mlp(build, index))


def _layer(build: Builder, index: int, cos_sin: Tensor | None, mlp: MLP) -> DecoderLayer:
    attention = build.scope("self_attn")
    return DecoderLayer(
        build.norm("input_layernorm"),
        _attention(attention, index, cos_sin),
        build.norm("post_attention_layernorm"),
        mlp,
    )


def _attention(build: Builder, index: int, cos_sin: Tensor | None) -> SelfAttention:
    norms = rms_head_norms(build, names=NORMS)
    return rotary_attention(build, index, cos_sin, head_norms=norms, rotates_first=True)
