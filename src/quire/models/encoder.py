"""Encoder: models whose tokens see the whole text. BERT and its kin norm after the additions, ModernBERT before.

T tokens of all texts, R output tokens, H hidden size. A family differs by the names of its tensors (`ENCODER_NAMES`);
what its config says decides on positions, gates, windows and rotary embeddings. The keys and values of a layer live in
the KV cache until the next layer overwrites them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quire.kernels import Kernels
from quire.layers.embedding import Embedding
from quire.layers.linear import LinearWeight
from quire.layers.norm import NoNorm, Norm
from quire.layers.step_context import StepContext
from quire.layers.text_attention import TextAttention
from quire.model_config import ModelConfig
from quire.models.blocks import GatedMLP, PlainMLP, SelfAttention, fused_attention, plain_mlp, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import MLP, DecoderLayer
from quire.models.distance_biases import distance_biases
from quire.models.joined_layers import joined_layers
from quire.models.llama import rotary_tables
from quire.models.opt import PostNormLayer
from quire.models.pooler import Pooler
from quire.models.vision.encoder import ImageEncoder
from quire.models.weights import WeightScope


class EncoderNames(NamedTuple):
    """What a family calls its tensors. Names of several spellings are tried in order."""

    model: str = "bert"
    other_model: str = ""
    """Another spelling of `model`."""
    word: tuple[str, ...] = ("embeddings.word_embeddings",)
    embedding_norm: tuple[str, ...] = ("embeddings.LayerNorm",)
    layers: tuple[str, ...] = ("encoder.layer",)
    qkv: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    """Three tensors, or one that holds them in this order."""
    o: tuple[str, ...] = ("attention.output.dense",)
    attention_norm: tuple[str, ...] = ("attention.output.LayerNorm",)
    up: tuple[str, ...] = ("intermediate.dense",)
    """With a gate: gate and up, or one tensor that holds both, the gate first unless `up_first`."""
    down: tuple[str, ...] = ("output.dense",)
    mlp_norm: tuple[str, ...] = ("output.LayerNorm",)
    norm: str = "final_norm"
    up_first: bool = False


_ROTARY_NAMES = EncoderNames(
    embedding_norm=("emb_ln", "embeddings.LayerNorm"),
    layers=("encoder.layers", "layers"),
    qkv=("attn.Wqkv",),
    o=("attn.out_proj",),
    attention_norm=("norm1",),
    mlp_norm=("norm2",),
)
ENCODER_NAMES: dict[str, EncoderNames] = {
    "Bert": EncoderNames(),
    "Roberta": EncoderNames(model="roberta"),
    "XLMRoberta": EncoderNames(model="roberta"),
    "Camembert": EncoderNames(model="roberta"),
    "MPNet": EncoderNames(
        model="mpnet",
        qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        o=("attention.attn.o",),
        attention_norm=("attention.LayerNorm",),
    ),
    "JinaBert": EncoderNames(up=("mlp.gated_layers",), down=("mlp.wo",), mlp_norm=("mlp.layernorm",)),
    "DistilBert": EncoderNames(
        model="distilbert",
        layers=("transformer.layer",),
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        o=("attention.out_lin",),
        attention_norm=("sa_layer_norm",),
        up=("ffn.lin1",),
        down=("ffn.lin2",),
        mlp_norm=("output_layer_norm",),
    ),
    "NomicBert": _ROTARY_NAMES._replace(model="nomic_bert", up=("mlp.fc12", "mlp.fc11"), down=("mlp.fc2",)),
    "JinaEmbeddingsV3": _ROTARY_NAMES._replace(
        model="roberta", qkv=("mixer.Wqkv",), o=("mixer.out_proj",), up=("mlp.fc1",), down=("mlp.fc2",)
    ),
    "Gte": EncoderNames(
        model="new",
        other_model="gte",
        qkv=("attention.qkv_proj",),
        o=("attention.o_proj",),
        attention_norm=("attn_ln",),
        up=("mlp.up_gate_proj",),
        up_first=True,
        down=("mlp.down_proj",),
        mlp_norm=("mlp_ln",),
    ),
    "ModernBert": EncoderNames(
        model="model",
        word=("embeddings.tok_embeddings",),
        embedding_norm=("embeddings.norm",),
        layers=("layers",),
        qkv=("attn.Wqkv",),
        o=("attn.Wo",),
        attention_norm=("attn_norm",),
        up=("mlp.Wi",),
        down=("mlp.Wo",),
        mlp_norm=("mlp_norm",),
    ),
}
ENCODER_NAMES["New"] = ENCODER_NAMES["Gte"]


class Encoder:
    """Embeddings and layers. Hidden states are final: norms that belong to the last layer are applied."""

    # Heads for pretraining, a pooler that the pooling does not read, and position numbers that old files store.
    ignored_tensors: tuple[str, ...] = (
        r"(^|\.)cls\.",
        r"^lm_head\.",
        r"^vocab_(transform|layer_norm|projector)\.",
        r"(^|\.)pooler\.",
        r"(^|\.)(position_ids|token_type_ids)$",
        r"\.rotary_emb\.",
        r"^(head|decoder)\.",
    )
    pooler: Pooler | None = None
    image_encoder: ImageEncoder | None = None

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        build = Builder(config, weights, kernels, dtype)
        names = ENCODER_NAMES[_family(config.architecture)]
        stored = weights.has(f"{names.other_model}.{names.word[0]}.weight")
        model = build.scope(names.other_model if stored else names.model)
        hidden, floats = config.hidden_size, weights.activation_dtype
        word = _spelling(model, names.word)
        self.word = Embedding(model.weights.take(f"{word}.weight", (config.vocab_size, hidden)), floats)
        self.positions: Embedding | None = None
        if config.rope is None and not config.alibi_slopes:
            rows = config.max_position_embeddings + config.position_offset
            table = model.weights.take("embeddings.position_embeddings.weight", (rows, hidden))
            self.positions = Embedding(table[config.position_offset :], floats)
        self.types: Tensor | None = None
        """[num_token_types, H]"""
        if config.num_token_types:
            shape = (config.num_token_types, hidden)
            self.types = model.weights.take("embeddings.token_type_embeddings.weight", shape).to(floats)
        self.embedding_norm = model.norm(_spelling(model, names.embedding_norm))
        device = self.word.table.device
        tables = rotary_tables(config, max_model_len, device) if config.rope else [None] * config.num_layers
        biases = distance_biases(config, model.weights, max_model_len)
        self.layers: list[DecoderLayer] = []
        self.norm: Norm = NoNorm()
        layers = _spelling(model, tuple(f"{name}.0" for name in names.layers)).removesuffix(".0")
        for index, cos_sin in enumerate(tables):
            attention = _attention(model.scope(f"{layers}.{index}"), names, index, cos_sin)
            if biases is not None:
                attention.attend = TextAttention(kernels, 0, scale=config.attention_scale, biases=biases)
            self._add_layer(model.scope(f"{layers}.{index}"), names, index, attention)
        if config.norm_before:
            self.norm = model.norm(names.norm)
        self.kernels = kernels
        self.joined = joined_layers(self.layers, self.norm)

    def _add_layer(self, build: Builder, names: EncoderNames, index: int, attention: SelfAttention) -> None:
        mlp = _mlp(build, names)
        if build.config.norm_before:
            skips = index == 0 and not build.config.first_norm
            norm: Norm = NoNorm() if skips else build.norm(names.attention_norm[0])
            self.layers.append(DecoderLayer(norm, attention, build.norm(names.mlp_norm[0]), mlp))
        else:
            self.layers.append(PostNormLayer(self.norm, attention, build.norm(names.attention_norm[0]), mlp))
            self.norm = build.norm(names.mlp_norm[0])

    def __call__(self, input_ids: Tensor, context: StepContext) -> Tensor:
        """input_ids int32 [T] -> hidden [T, H], or [R, H] of the output tokens."""
        x = self.word(input_ids)
        if self.types is not None:
            if context.token_types is None:
                x += self.types[0]
            else:
                x += self.types[context.token_types]
        residual = self.embedding_norm(x, None if self.positions is None else self.positions(context.positions))
        if self.joined is not None and context.output_tokens is None:
            return self.joined(self.kernels, residual, context)
        update, inner = None, context.for_inner_layers
        for layer in self.layers[:-1]:
            residual, update = layer(residual, update, inner)
        return self.norm(*self.layers[-1](residual, update, context))

    def logits(self, hidden: Tensor) -> Tensor:
        """An encoder makes no logits; the engine refuses requests that need some."""
        raise NotImplementedError("an encoder has no output head")

    def scale_kv(self) -> None:
        """Scale keys and values for a cache of float8 from now on."""
        self.joined = None
        for layer in self.layers:
            layer.attention.scale_kv(layer.attention_norm)


def _family(architecture: str) -> str:
    """The row of `ENCODER_NAMES`."""
    return architecture.removesuffix("Model").removesuffix("ForMaskedLM").removesuffix("ForSequenceClassification")


def _spelling(build: Builder, names: tuple[str, ...]) -> str:
    """The first of the names that the checkpoint has, by a tensor or the tensors of a layer below it."""
    for name in names:
        if build.weights.has(f"{name}.weight") or any(build.weights.has(f"{name}.{probe}") for probe in _PROBES):
            return name
    return names[0]


_PROBES = ("attn.Wqkv.weight", "mixer.Wqkv.weight")


def _attention(build: Builder, names: EncoderNames, index: int, cos_sin: Tensor | None) -> SelfAttention:
    if len(names.qkv) == 1:
        return fused_attention(build, index, names=(names.qkv[0], names.o[0]), cos_sin=cos_sin)
    return rotary_attention(build, index, cos_sin, names=(*names.qkv, names.o[0]))


def _mlp(build: Builder, names: EncoderNames) -> MLP:
    config, hidden, inner = build.config, build.config.hidden_size, build.config.intermediate_size
    if not config.gated_mlp:
        mlp: PlainMLP = plain_mlp(build, (names.up[0], names.down[0]))
        return mlp
    down = build.linear({names.down[0]: hidden}, inner, bias=config.mlp_bias or config.mlp_down_bias)
    if len(names.up) == 2:
        gate_up = build.linear(dict.fromkeys(names.up, inner), hidden, bias=config.mlp_bias)
    else:
        both: LinearWeight = build.weights.take_linear(names.up[0], (2 * inner, hidden), bias=config.mlp_bias)
        rows = torch.arange(2 * inner, device=both.weight.device)
        gate_up = build.pack(both.select_rows(rows.roll(inner)) if names.up_first else both)
    return GatedMLP(gate_up, down, config.activation)
