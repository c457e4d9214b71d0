"""Llama, and the families that differ from it by configuration alone: Mistral and Ministral (sliding window, queries
scaled by position), Qwen2 (biases on queries, keys and values), Qwen3 (norms of queries and keys), Gemma (an offset of
its norms), Granite (factors), SmolLM3 (layers that rotate nothing)."""

from typing import NamedTuple

import torch
from torch import Tensor

from quire.kernels import Kernels
from quire.layers.rotary import cos_sin_table
from quire.model_config import ModelConfig
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


def rotary_tables(config: ModelConfig, num_positions: int, device: torch.device) -> list[Tensor | None]:
    """The table of every layer, None for a layer that rotates nothing. Layers of one kind share it."""
    ropes = [config.rope_of(layer) for layer in range(config.num_layers)]
    tables = {
        rope: cos_sin_table(rope, config.rope_head_dim, num_positions).to(device)
        for rope in set(ropes)
        if rope is not None
    }
    return [None if rope is None else tables[rope] for rope in ropes]


class Llama(Decoder):
    """A family whose layers differ overrides `make_layer`, one with other names of tensors `names`."""

    names = DecoderNames()

    ignored_tensors: tuple[str, ...] = (r"^lm_head\.weight$",)  # some store the head although it is tied

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        build = Builder(config, weights, kernels, dtype)
        names = self.names
        model = build.scope(names.model)
        head = next((name for name in names.heads if weights.has(f"{name}.weight")), names.heads[0])
        table = build.table(f"{names.model}.{names.embedding}", config.hidden_size, head)
        factor = config.embedding_multiplier
        tables = rotary_tables(config, max_model_len, table.device)
        super().__init__(
            build.ends(table, head),
            [
                self.make_layer(model.scope(f"{names.layers}.{config.first_layer + index}"), index, cos_sin)
                for index, cos_sin in enumerate(tables)
            ],
            model.final_norm(names.norm),
            embedding_norm=model.norm(names.embedding_norm) if config.embedding_norm and build.is_first_stage else None,
            embedding_factor=build.rounded(factor) if config.round_embedding_multiplier else factor,
            logits_factor=config.logits_multiplier,
            logits_softcap=config.logits_softcap,
        )

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        attention = build.scope("self_attn")
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(attention, index, cos_sin, head_norms=rms_head_norms(attention)),
            build.norm("post_attention_layernorm"),
            gated_mlp(build.scope("mlp"), build.config.intermediate_size),
            residual_factor=build.config.residual_multiplier,
        )
