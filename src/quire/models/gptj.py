"""GPT-J: attention and MLP read one LayerNorm, adjacent elements of a part of each head rotate together, and the output
head has a bias."""

from torch import Tensor

from quire.models.blocks import plain_mlp, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import DecoderNames, Llama


class GPTJ(Llama):
    """The layers follow from the config; the names are GPT-2's, but queries, keys and values are stored apart."""

    names = DecoderNames("transformer", "wte", "h", "ln_f")
    # Old checkpoints store causal masks; the head may be stored although it is tied.
    ignored_tensors = (r"\.attn\.(masked_)?bias$", r"^lm_head\.weight$")

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        return DecoderLayer(
            build.norm("ln_1"),
            rotary_attention(build.scope("attn"), index, cos_sin, names=names),
            None,
            plain_mlp(build.scope("mlp"), ("fc_in", "fc_out")),
        )
