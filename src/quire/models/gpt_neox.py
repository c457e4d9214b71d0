"""GPT-NeoX and Pythia: queries, keys and values are one layer, a part of each head is rotated, and a parallel residual
has two norms."""

from torch import Tensor

from quire.models.blocks import fused_attention, plain_mlp
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import DecoderNames, Llama


class GPTNeoX(Llama):
    """Published checkpoints and those that transformers writes name the head `embed_out`."""

    names = DecoderNames("gpt_neox", "embed_in", "layers", "final_layer_norm", ("embed_out", "lm_head"))
    # Causal masks of old checkpoints; the head may be stored although it is tied.
    ignored_tensors = (r"\.attention\.bias$", r"^(embed_out|lm_head)\.weight$")

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return DecoderLayer(
            build.norm("input_layernorm"),
            fused_attention(build.scope("attention"), index, cos_sin=cos_sin, by_kv_head=True),
            build.norm("post_attention_layernorm"),
            plain_mlp(build.scope("mlp"), ("dense_h_to_4h", "dense_4h_to_h")),
            parallel_residual=build.config.parallel_residual,
        )
