"""Llama, and the families that differ from it by configuration alone: Mistral (sliding window), Qwen2 (biases on
queries, keys and values), Qwen3 (norms of queries and keys)."""

from typing import NamedTuple

from torch import Tensor

from quire.kernels import Kernels
from quire.layers.rotary import cos_sin_table
from quire.model_config import ModelConfig, RopeConfig
from quire.models.blocks import gated_mlp, rms_head_norms, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import Decoder, DecoderLayer
from quire.models.weights import WeightScope


class DecoderNames(NamedTuple):
    """What a family calls the tensors around its layers, and the list of its layers."""

    model: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    heads: tuple[str, ...] = ("lm_head",)
    """Names of the output head; the checkpoint has one of them, where the head is not tied."""
    embedding_norm: str = "embedding_norm"
    """Read where the config has one."""


class Llama(Decoder):
    """A family whose layers differ overrides `make_layer`, one with other names of tensors `names`."""

    names = DecoderNames()

    # Old checkpoints store the rotary frequencies; some store the head although it is tied.
    ignored_tensors: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$", r"^lm_head\.weight$")

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        build = Builder(config, weights, kernels, dtype)
        names = self.names
        model = build.scope(names.model)
        if not model.weights.has(f"{names.embedding}.weight") and weights.has(f"{names.embedding}.weight"):
            model = build  # a checkpoint of the bare model, without head
        table = model.weights.take(f"{names.embedding}.weight", (config.vocab_size, config.hidden_size))
        cos_sin = cos_sin_table(config.rope or RopeConfig(), config.head_dim, max_model_len).to(table.device)
        head = next((name for name in names.heads if weights.has(f"{name}.weight")), names.heads[0])
        super().__init__(
            build.ends(table, head),
            [
                self.make_layer(model.scope(f"{names.layers}.{index}"), index, cos_sin)
                for index in range(config.num_layers)
            ],
            model.norm(names.norm),
            embedding_norm=model.norm(names.embedding_norm) if config.embedding_norm else None,
            embedding_factor=build.rounded(config.embedding_multiplier),
            logits_softcap=config.logits_softcap,
        )

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor) -> DecoderLayer:
        attention = build.scope("self_attn")
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(attention, index, cos_sin, head_norms=rms_head_norms(attention)),
            build.norm("post_attention_layernorm"),
            gated_mlp(build.scope("mlp"), build.config.intermediate_size),
        )
