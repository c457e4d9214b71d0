"""Granite 4 hybrid: Mamba-2 beside attention, Granite's factors, and a shared network beside experts or alone."""

from torch import Tensor

from quire.models.blocks import GatedMLP, fused_gated_mlp
from quire.models.builder import Builder
from quire.models.decoder import MLP, DecoderLayer
from quire.models.granite_moe import GraniteMoE
from quire.models.recurrent import mamba2_or_attention


class GraniteHybrid(GraniteMoE):
    """Granite-MoE's names around the experts; the shared network lies beside them."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return DecoderLayer(
            build.norm("input_layernorm"),
            mamba2_or_attention(build, index, cos_sin),
            build.norm("post_attention_layernorm"),
            self.make_mlp(build, index),
            residual_factor=build.config.residual_multiplier,
        )

    def make_mlp(self, build: Builder, index: int) -> MLP:
        if build.config.has_experts(index):
            return super().make_mlp(build, index)
        return _shared(build, build.config.intermediate_size)

    def make_shared(self, build: Builder, block: Builder) -> GatedMLP:
        return _shared(build, build.config.shared_expert_intermediate_size)


def _shared(build: Builder, width: int) -> GatedMLP:
    return fused_gated_mlp(build.scope("shared_mlp"), width, names=("input_linear", "output_linear"))
