"""ModelConfig: the shape and the rules of one model, as data."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from quire.gguf.file import is_gguf, read_gguf
from quire.layer_spec import LayerSpec, LinearSpec, ModelSpec, VectorSpec
from quire.layer_stage import Stage
from quire.model_config.architectures import ARCHITECTURES, STANDARD_LAYERS
from quire.model_config.config_file import read_config_file
from quire.model_config.config_json import ConfigJson
from quire.model_config.experts import RouterConfig
from quire.model_config.fallback import is_computed_by_transformers
from quire.model_config.fields import read_fields
from quire.model_config.generic import generic_fields
from quire.model_config.gguf_config import block_bytes_of
from quire.model_config.latent import LatentShape
from quire.model_config.packed_folder import packed_as
from quire.model_config.pooling import PoolingConfig, Task, read_max_length, read_pooling, with_task
from quire.model_config.recurrent import RecurrentConfig
from quire.model_config.rope import RopeConfig
from quire.model_config.token_ids import read_end_tokens
from quire.model_config.vision import VisionConfig
from quire.quantization.stored import KeptBits, StoredWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and rules of one model. `from_folder` reads it.

    A family reads the fields it supports; what a field's default says is what Llama does. `spec` tells the model's
    layers and every size that follows from them.
    """

    architecture: str
    """The row of ARCHITECTURES."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Inner width of a dense MLP."""
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int
    """Elements of what a query is multiplied with: a key, or the row of `latent`."""
    max_position_embeddings: int

    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    """Norms have a bias beside the weight."""
    norm_unit_offset: bool = False
    """A norm multiplies by 1 + weight (Gemma)."""
    pre_norms: bool = True
    """What attention and the MLP read is a norm of the residual stream; else the stream itself (OLMo 2)."""
    norm_before: bool = True
    """Norms precede attention and the MLP. False: they follow the additions, x = norm(x + attention(x)), and the last
    layer's norm is the final one (OPT-350M)."""
    first_norm: bool = True
    """The first layer's attention reads a norm of its input; else the input itself (ModernBERT)."""
    final_norm: bool = True
    """There is a norm before the output head that belongs to no layer."""
    post_norms: bool = False
    """What attention and the MLP compute passes a norm of its own before it is added to the residual stream: four
    norms a layer instead of two (Gemma 2)."""
    parallel_residual: bool = False
    """Attention and MLP both read the one norm of the layer's input, and both are added: x + attention(norm(x)) +
    mlp(norm(x)). Such a layer has one norm (StableLM)."""
    parallel_mlp_norm: bool = False
    """With a parallel residual the MLP reads a norm of its own of the layer's input (GPT-NeoX)."""

    activation: str = "silu"
    """silu, gelu, gelu_tanh or relu."""
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    mlp_down_bias: bool = False
    """The last layer of an MLP has a bias, the others have none (GTE)."""

    num_experts: int = 0
    """Experts of a layer, in the place of the MLP; 0: all layers are dense."""
    dense_layers: frozenset[int] = frozenset()
    """Indices of the layers that have an MLP although others have experts."""
    num_experts_per_token: int = 0
    """Experts that the router chooses for a token."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """How it chooses them."""
    norm_topk: bool = True
    """The scores of the chosen experts are divided by their sum before they weigh the outputs."""
    expert_intermediate_size: int = 0
    """Inner width of one expert."""
    shared_expert_intermediate_size: int = 0
    """Inner width of a network that every token passes beside its experts; 0: there is none."""
    shared_expert_gate: bool = False
    """The shared network's output is multiplied by a sigmoid of the token's own (Qwen2-MoE)."""
    expert_bias: bool = False
    """The router and every layer of every expert have a bias (gpt-oss)."""
    mxfp4_experts: bool = False
    """The checkpoint stores experts as MXFP4, and kernels that can multiply it keep its bits."""

    recurrent: RecurrentConfig | None = None
    """The layers with a recurrent state in the place of attention; None: all layers have attention."""
    attention_gate: bool = False
    """What attention computes is multiplied by a sigmoid of the token's own, which is stored with the queries
    (Qwen3-Next)."""
    latent: LatentShape | None = None
    """All heads read one row a token, and `num_kv_heads` is 1 (DeepSeek); None: keys and values."""
    clip_qkv: float = 0.0
    """Queries, keys and values are limited to magnitudes up to this; 0: they are left as they are (MPT)."""
    qk_norm: bool = False
    """Queries and keys pass a norm of `head_dim` elements before they are rotated."""
    qk_norm_per_head: bool = False
    """Every head has a weight of its own in that norm (StableLM); else all heads share one."""
    qk_norm_bias: bool = False
    """That norm has a bias beside the weight (Phi)."""
    qk_norm_joint: bool = False
    """That norm is of all heads together, as one long vector with a weight for each element (OLMo 2)."""
    query_pre_attn_scalar: float | None = None
    """Scores are multiplied by this ** -0.5; None: by head_dim ** -0.5. `attention_scale` has the factor."""
    attention_multiplier: float | None = None
    """The factor of the scores itself, in the place of that (Granite)."""
    attention_softcap: float = 0.0
    """Scores become softcap * tanh(score / softcap) after scaling; 0: they are left as they are."""
    layer_windows: tuple[int, ...] = ()
    """Per layer, how many positions a token attends to, itself included; 0 for all."""
    attention_sinks: bool = False
    """Every head has one more score in its softmax, learned and without a value (gpt-oss)."""
    alibi_slopes: tuple[float, ...] = ()
    """Per query head: the slope times (key position - query position) is added to each scaled score. Empty: nothing
    is."""
    num_distance_buckets: int = 0
    """Buckets of distances; each head has a learned bias for each of them (MPNet). 0: there is none."""
    rope: RopeConfig | None = None
    """None without `alibi_slopes`: positions are learned, one embedding each."""
    position_offset: int = 0
    """Rows of that table before the first position's (OPT)."""
    layer_ropes: tuple[RopeConfig | None, ...] = ()
    """The rotary embedding of each layer, where layers differ in it: None for a layer that rotates nothing. `rope` is
    then that of the layers that attend to all positions. Empty: every layer has `rope`."""
    positions_are_stretched: bool = False
    """`max_position_embeddings` already counts the stretch of a scaled rotary embedding (Gemma 3)."""

    embedding_norm: bool = False
    """Token embeddings pass a norm of the kind of the others before the first layer (BLOOM)."""
    embedding_width: int = 0
    """Width of the token embeddings and of the head's input, where projections lead to `hidden_size` and back
    (OPT-350M); 0: it is `hidden_size`, without projections."""
    embedding_multiplier: float = 1.0
    """Factor of the token embeddings."""
    round_embedding_multiplier: bool = False
    """transformers rounds that factor to the type of the weights it loads (Gemma)."""
    residual_multiplier: float = 1.0
    """Factor of what attention and the MLP compute before it is added to the residual stream (Granite)."""
    logits_multiplier: float = 1.0
    """Factor of the logits."""
    logits_softcap: float = 0.0
    """Logits become softcap * tanh(logit / softcap); 0: they are left as they are."""
    tie_word_embeddings: bool = False
    head_bias: bool = False
    """The output head has a bias, its own even where its weight is the embedding's."""

    is_encoder: bool = False
    """Tokens attend to the whole text, or to both sides within a window. A text is computed in one step, and nothing of
    it is kept."""
    num_token_types: int = 0
    """Rows of the table whose first row is added to every token, and the second to those of the second text of a
    pair."""
    pooling: PoolingConfig | None = None
    """How a text becomes a vector; None: the model generates, and its embeddings are hidden states of last tokens."""
    generates_only: bool = False
    """By the option `task` it makes no embeddings."""
    max_text_length: int | None = None
    """The longest text that sentence-transformers was set to."""
    vision: VisionConfig | None = None
    """The image encoder; None for a model that reads text only."""

    num_ranks: int = 1
    """Ranks that hold the model together; above 1, heads and inner widths are those of one of them (`divided`)."""
    stage: Stage | None = None
    """The layers of this rank, where ranks hold them one after the other (`stages`); None: all."""
    computed_by: str = ""
    """The folder of a model that transformers computes, since Quire has no class for its family; else empty."""
    stored: StoredWeights | None = None
    """How the checkpoint stores dense layers in few bits; None: in floats."""
    kept: KeptBits | None = None
    """What the files hold of them, as kernels that keep these bits store it; None: layers become floats."""
    packed_as: str | None = None
    """The quantisation by which the files hold packed weights; None: they hold the checkpoint's own."""
    checkpoint_dtype: str = "float32"
    block_bytes: int = 0
    """Bytes of the weights of a checkpoint in blocks of few bits (GGUF), which a CPU multiplies as they are stored; 0
    for all others."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read config.json and, for the end tokens, generation_config.json; or the metadata of a GGUF file.

        Raises `CheckpointError` for what is missing or not supported.
        """
        path, values = read_config_file(folder)
        if is_computed_by_transformers(path, values):
            return cls._estimated(path, values, computed_by=str(path.parent))
        config = cls(**read_fields(ConfigJson(path, values)))
        if is_gguf(path):
            return replace(config, block_bytes=block_bytes_of(read_gguf(path)))
        return replace(
            config,
            eos_token_ids=read_end_tokens(path, config.eos_token_ids),
            pooling=read_pooling(path, values, config.architecture, is_encoder=config.is_encoder),
            max_text_length=read_max_length(path.parent),
            packed_as=packed_as(path.parent),
        )

    def for_task(self, task: str, pooling_type: str = "auto", token_ids: tuple[int, ...] = ()) -> "ModelConfig":
        """The model as the options `task` and `pooling_type` ask for it; `token_ids` are those of no and yes. Raises
        `ConfigError` for a task that the model cannot have."""
        pooling = with_task(self.pooling, task, pooling_type, token_ids)
        return replace(self, pooling=pooling, generates_only=task == "generate")

    @property
    def task(self) -> Task:
        """What the model is for."""
        return "generate" if self.pooling is None else self.pooling.task

    @property
    def normalizes(self) -> bool:
        """Whether its embeddings have length 1 unless a request says otherwise."""
        return self.pooling is None or self.pooling.normalize

    @property
    def needs_whole_texts(self) -> bool:
        """Whether a text must be computed in one step."""
        return self.is_encoder or (self.pooling is not None and self.pooling.reads_all_tokens)

    @classmethod
    def estimated(cls, folder: str | Path) -> "ModelConfig":
        """The shape of a model that cannot be served yet, by the usual spellings of its sizes."""
        return cls._estimated(*read_config_file(folder))

    @classmethod
    def _estimated(cls, path: Path, values: dict[str, Any], *, computed_by: str = "") -> "ModelConfig":
        ends = read_end_tokens(path, values.get("eos_token_id"))
        return cls(**generic_fields(path, values), eos_token_ids=ends, computed_by=computed_by)

    @property
    def context_length(self) -> int:
        """Most tokens a sequence can have: positions trained, times the stretch of scaled rotary embeddings."""
        rope = self.rope
        if rope is None or self.positions_are_stretched:
            return self.max_position_embeddings
        if rope.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * rope.factor)
        if rope.rope_type == "yarn":
            return max(self.max_position_embeddings, int(rope.original_max_position * rope.factor))
        return self.max_position_embeddings

    @property
    def first_layer(self) -> int:
        """Index in the checkpoint of the first layer."""
        return 0 if self.stage is None else self.stage.first_layer

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in the place of its MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer has a recurrent state in the place of attention."""
        return self.recurrent is not None and layer in self.recurrent.layers

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a KV cache, in its order."""
        return tuple(layer for layer in range(self.num_layers) if not self.is_recurrent(layer))

    @property
    def default_model_len(self) -> int:
        """Most tokens a sequence can have unless `max_model_len` asks for more; see `RopeConfig.is_long`."""
        rope, longest = self.rope, self.context_length
        if rope is not None and rope.rope_type == "longrope":
            longest = min(longest, rope.original_max_position)
        return longest if self.max_text_length is None else min(longest, self.max_text_length)

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of a layer; None: it rotates nothing."""
        return self.layer_ropes[layer] if self.layer_ropes else self.rope

    def kv_layer(self, layer: int) -> int:
        """The index of a layer's part of the KV cache. In an encoder all layers with the same window share one."""
        if self.is_encoder:
            return list(dict.fromkeys(self.layer_windows)).index(self.layer_windows[layer])
        return self.attention_layers.index(layer)

    @property
    def attention_needs(self) -> tuple[str, ...]:
        """Kinds of attention that not every backend computes."""
        found = {
            "attention sinks": self.attention_sinks,
            "latent attention": self.latent is not None,
            "images seen from both sides": self.tokens_of_whole_images > 0,
        }
        return tuple(kind for kind, has in found.items() if has)

    @property
    def tokens_of_whole_images(self) -> int:
        """Tokens of an image, where they see each other and are computed in one step; 0: they see those before them."""
        return 0 if self.vision is None else self.vision.whole_image_tokens

    @property
    def rope_head_dim(self) -> int:
        """Elements of a head that may be rotated; `RopeConfig.partial_rotary_factor` is a share of them."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def num_qkv_heads(self) -> int:
        """Heads of queries, keys, values and gates together."""
        return (2 if self.attention_gate else 1) * self.num_heads + 2 * self.num_kv_heads

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        scale: float = (self.query_pre_attn_scalar or self.head_dim) ** -0.5
        return scale

    @property
    def pixels_per_position(self) -> int:
        """Pixels in each direction for which one of the positions of a rotary embedding with sections grows by one; 0
        for an embedding with one position."""
        if self.vision is None or self.rope is None or not self.rope.sections:
            return 0
        return self.vision.patch_size * self.vision.merge

    @property
    def spec(self) -> ModelSpec:
        """The model's layers and ends as plain values; sizes are sums over them."""
        return _spec(self)


@cache
def _spec(config: ModelConfig) -> ModelSpec:
    """Layers by the function that the family's row names; published shapes without a row have standard ones."""
    row = ARCHITECTURES.get(config.architecture)
    num_tokens = -(-config.vocab_size // config.num_ranks)
    module, name = (row.layers if row is not None else STANDARD_LAYERS).split(":")
    layers: Callable[[ModelConfig], tuple[LayerSpec, ...]] = getattr(import_module(module), name)
    hidden, width = config.hidden_size, config.embedding_width or config.hidden_size
    num_positions = config.max_position_embeddings + config.position_offset
    learned = config.rope is None and not config.alibi_slopes
    distances = (VectorSpec("distances", config.num_distance_buckets * config.num_heads),)
    types = (VectorSpec("token_types", config.num_token_types * hidden),) if config.num_token_types else ()
    positions = LinearSpec("positions", num_positions, hidden) if learned else None
    projections = (
        LinearSpec("project_in", hidden, width, quantizes=False),
        LinearSpec("project_out", width, hidden, quantizes=False),
    )
    embedding_norm = norm_vectors(config, "embedding_norm") if config.embedding_norm else ()
    head_bias = (VectorSpec("head.bias", num_tokens),) if config.head_bias else ()
    vision = config.vision
    encoder = () if vision is None else vision.vectors
    spec = ModelSpec(
        layers=layers(config),
        embedding=LinearSpec("embedding", num_tokens, width),
        head=None if config.is_encoder else LinearSpec("head", num_tokens, width),
        is_encoder=config.is_encoder,
        projections=projections if config.embedding_width else (),
        tied=config.tie_word_embeddings,
        kept=config.kept,
        positions=positions,
        image_encoder=() if vision is None else vision.linears,
        vectors=(norm_vectors(config, "norm") if config.final_norm else ())
        + embedding_norm
        + head_bias
        + types
        + (distances if config.num_distance_buckets else ())
        + encoder,
    )
    return spec if config.stage is None else config.stage.own_part(spec)


def norm_vectors(config: ModelConfig, name: str) -> tuple[VectorSpec, ...]:
    """Weight and bias of one norm of the residual stream."""
    weight = VectorSpec(f"{name}.weight", config.hidden_size)
    return (weight, VectorSpec(f"{name}.bias", config.hidden_size)) if config.norm_bias else (weight,)
