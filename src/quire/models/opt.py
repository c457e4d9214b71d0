"""OPT: learned positions, LayerNorms before or after the halves of a layer, and projections from the width of the token
embeddings to that of the layers and back."""

from torch import Tensor

from quire.kernels import Kernels
from quire.layers.embedding import Embedding
from quire.layers.norm import NoNorm, Norm
from quire.layers.step_context import StepContext
from quire.model_config import ModelConfig
from quire.models.blocks import PlainMLP, SelfAttention, plain_mlp, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import Decoder, DecoderLayer
from quire.models.weights import WeightScope


class PostNormLayer(DecoderLayer):
    """A layer whose norms follow the additions: x = norm(x + attention(x)), then x = norm(x + mlp(x)).

    `attention_norm` is the last norm of the layer before, so that a layer ends with its update as other layers do.
    """

    def __call__(self, residual: Tensor, update: Tensor | None, context: StepContext) -> tuple[Tensor, Tensor]:
        residual = self.attention_norm(residual, update)
        update = self.attention(residual, context)
        assert self.mlp_norm is not None
        residual = self.mlp_norm(context.select_output(residual), update)
        return residual, self.mlp(residual)


class OPT(Decoder):
    """The position's embedding is the first update of the residual stream."""

    # fairseq's format number; the head may be stored although it is tied.
    ignored_tensors = (r"(^|\.)decoder\.version$", r"^lm_head\.weight$")

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        build = Builder(config, weights, kernels, dtype)
        model = build.scope("model.decoder")
        hidden, width = config.hidden_size, config.embedding_width or config.hidden_size
        ends = build.ends(build.table("model.decoder.embed_tokens", width))
        offset = config.position_offset
        positions = None
        if build.is_first_stage:
            table = model.weights.take("embed_positions.weight", (config.max_position_embeddings + offset, hidden))
            positions = Embedding(table[offset:], weights.activation_dtype)
        project_in = project_out = None
        if config.embedding_width and build.is_first_stage:
            project_in = model.pack(model.weights.take_linear("project_in", (hidden, width)), quantizes=False)
        if config.embedding_width and build.is_last_stage:
            project_out = model.pack(model.weights.take_linear("project_out", (width, hidden)), quantizes=False)
        layers, norm = _layers(model) if config.norm_before else _post_norm_layers(model)
        super().__init__(
            ends,
            layers,
            norm,
            position_embedding=positions,
            projections=(project_in, project_out),
        )


def _halves(build: Builder, index: int) -> tuple[SelfAttention, PlainMLP]:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return rotary_attention(build.scope("self_attn"), index, None, names=names), plain_mlp(build, ("fc1", "fc2"))


def _layers(model: Builder) -> tuple[list[DecoderLayer], Norm]:
    """The layers and the final norm."""
    layers = []
    for index in range(model.config.num_layers):
        build = model.scope(f"layers.{model.config.first_layer + index}")
        attention, mlp = _halves(build, index)
        layers.append(DecoderLayer(build.norm("self_attn_layer_norm"), attention, build.norm("final_layer_norm"), mlp))
    norm: Norm = model.final_norm("final_layer_norm") if model.config.final_norm else NoNorm()
    return layers, norm


def _post_norm_layers(model: Builder) -> tuple[list[DecoderLayer], Norm]:
    """The layers, and the last layer's last norm, which is the final one."""
    layers: list[DecoderLayer] = []
    norm: Norm = NoNorm()
    for index in range(model.config.num_layers):
        build = model.scope(f"layers.{index}")
        attention, mlp = _halves(build, index)
        layers.append(PostNormLayer(norm, attention, build.norm("self_attn_layer_norm"), mlp))
        norm = build.norm("final_layer_norm")
    return layers, norm
