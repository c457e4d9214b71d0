"""Bamba: Mamba-2 beside attention that rotates half of each head, and a gated MLP in every layer."""

from torch import Tensor

from quire.models.blocks import gated_mlp
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import DecoderNames, Llama
from quire.models.recurrent import mamba2_or_attention


class Bamba(Llama):
    """Llama's names, but for norms and MLPs."""

    names = DecoderNames(norm="final_layernorm")

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return DecoderLayer(
            build.norm("input_layernorm"),
            mamba2_or_attention(build, index, cos_sin),
            build.norm("pre_ff_layernorm"),
            gated_mlp(build.scope("feed_forward"), build.config.intermediate_size),
        )
