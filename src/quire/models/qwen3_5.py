"""Qwen3.5: Qwen3-Next with the projections of a gated delta net stored apart, and with dense layers or experts."""

from quire.models.builder import Builder
from quire.models.llama import DecoderNames
from quire.models.moe import FUSED, ExpertNames
from quire.models.qwen3_next import Qwen3Next
from quire.models.recurrent import GatedDeltaNet


class Qwen35(Qwen3Next):
    """The text model. Published files hold the experts of a layer in one tensor."""

    layouts = (ExpertNames(fused=FUSED), ExpertNames())
    ignored_tensors = (*Qwen3Next.ignored_tensors, r"^model\.visual\.")

    def make_delta_net(self, build: Builder, index: int) -> GatedDeltaNet:
        config, recurrent = build.config, build.config.recurrent
        assert recurrent is not None
        hidden, num_heads = config.hidden_size, recurrent.num_heads
        strengths, decays = (
            build.weights.take_linear(name, (num_heads, hidden)) for name in ("in_proj_b", "in_proj_a")
        )
        return GatedDeltaNet(
            build,
            index,
            build.linear({"in_proj_qkv": recurrent.num_channels, "in_proj_z": recurrent.inner_size}, hidden),
            build.pack(strengths, decays, quantizes=False),
            build.linear({"out_proj": hidden}, recurrent.inner_size),
        )


class Qwen35Text(Qwen35):
    """Qwen3.5 as it is published with a vision tower: its text model."""

    names = DecoderNames("model.language_model")
