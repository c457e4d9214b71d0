"""Qwen3-Next: three gated delta nets for each layer of gated attention, and experts in all of them."""

import torch
from torch import Tensor

from quire.models.blocks import rms_head_norms, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.moe import MoELlama
from quire.models.recurrent import GatedDeltaNet


class Qwen3Next(MoELlama):
    """Qwen2-MoE's names around the layers; the projections of a gated delta net are stored by key head."""

    ignored_tensors = (*MoELlama.ignored_tensors, r"^mtp\.")

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        attention = build.scope("self_attn")
        is_recurrent = build.config.is_recurrent(index)
        return DecoderLayer(
            build.norm("input_layernorm"),
            self.make_delta_net(build.scope("linear_attn"), index)
            if is_recurrent
            else rotary_attention(attention, index, cos_sin, head_norms=rms_head_norms(attention)),
            build.norm("post_attention_layernorm"),
            self.make_mlp(build, index),
        )

    def make_delta_net(self, build: Builder, index: int) -> GatedDeltaNet:
        """Rows are stored key head by key head: its query and key, the values and gates of the heads it serves; and in
        another matrix their write strengths and decays."""
        config, recurrent = build.config, build.config.recurrent
        assert recurrent is not None
        key_heads, group = recurrent.num_key_heads, recurrent.num_heads // recurrent.num_key_heads
        key_rows, value_rows = recurrent.key_dim, group * recurrent.value_dim
        fused = build.weights.take_linear("in_proj_qkvz", (key_heads * 2 * (key_rows + value_rows), config.hidden_size))
        per_head = build.weights.take_linear("in_proj_ba", (2 * recurrent.num_heads, config.hidden_size))
        return GatedDeltaNet(
            build,
            index,
            build.pack(fused.select_rows(_parts_first(key_heads, (key_rows, key_rows, value_rows, value_rows)))),
            build.pack(per_head.select_rows(_parts_first(key_heads, (group, group))), quantizes=False),
            build.linear({"out_proj": config.hidden_size}, recurrent.inner_size),
        )


def _parts_first(num_heads: int, sizes: tuple[int, ...]) -> Tensor:
    """Rows are stored head by head, in parts of these sizes. Returns the order of the first parts of all heads, then
    the second, and so on."""
    rows = torch.arange(num_heads * sum(sizes)).view(num_heads, -1)
    return torch.cat([part.flatten() for part in rows.split_with_sizes(sizes, dim=1)])
