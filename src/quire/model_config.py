"""ModelConfig: the shape of a model, read from the config.json of a Hugging Face folder, and what follows from it.

Everything that must be known before a weight is read is here: the memory of weights, activations and KV, the context
length, the end tokens. The table ARCHITECTURES is the list of what Quire can load; a row names the class that computes
the model and what config.json leaves unsaid about it. No torch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError
from quire.quantization import METHODS

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
KV_DTYPE_BYTES = {**DTYPE_BYTES, "int8": 1, "fp8_e4m3": 1}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""config.json's name → ours."""
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A row of ARCHITECTURES. `names` maps our keys to other spellings, `implied` holds values config.json may omit."""

    model: str
    """The class, as "module:Class"; imported when a checkpoint needs it."""
    names: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Options of config.json that are supported with this one value."""


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        implied={"max_position_embeddings": 2048, "use_sliding_window": False},
    ),
    "MistralForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        implied={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
    ),
    "Qwen2ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        implied={"max_position_embeddings": 32768, "qkv_bias": True, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Architecture(
        model="quire.models.llama:Llama",
        implied={"max_position_embeddings": 32768, "head_dim": 128, "qk_norm": True, "sliding_window": 4096},
    ),
    "GPT2LMHeadModel": Architecture(
        model="quire.models.gpt2:GPT2",
        names={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        implied={
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "gated_mlp": False,
            "layer_norm": True,
            "learned_positions": True,
        },
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: the base, how it is stretched beyond the length of training, and by how much."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    """Length of training; read for dynamic, llama3 and yarn."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and rules of one model. `from_folder` reads it; raises `CheckpointError` for what is not supported."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-6
    activation: str = "silu"
    """silu, gelu or gelu_tanh."""
    gated_mlp: bool = True
    layer_norm: bool = False
    """LayerNorm with a bias instead of RMSNorm."""
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope: RopeConfig | None = None
    """None: positions are learned, one embedding each."""
    layer_windows: tuple[int, ...] = ()
    """Per layer, how many positions a token sees, itself included; 0 for all."""
    checkpoint_dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read config.json and, for the end tokens, generation_config.json."""
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; a Hugging Face checkpoint folder holds one")
        config = read_json(path)
        generation = Path(folder) / "generation_config.json"
        if generation.is_file():
            end = read_json(generation).get("eos_token_id")
            config = config if end is None else {**config, "eos_token_id": end}
        return _Reader(path, config).model_config()

    @property
    def context_length(self) -> int:
        """Most tokens a sequence can have: positions trained, times the stretch of scaled rotary embeddings."""
        rope = self.rope
        if rope is None:
            return self.max_position_embeddings
        if rope.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * rope.factor)
        if rope.rope_type == "yarn":
            return max(self.max_position_embeddings, int(rope.original_max_position * rope.factor))
        return self.max_position_embeddings

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """Outputs and inputs of the dense layers of one decoder layer."""
        heads, queries = self.num_heads + 2 * self.num_kv_heads, self.num_heads * self.head_dim
        return (
            (heads * self.head_dim, self.hidden_size),
            (self.hidden_size, queries),
            (self.intermediate_size * (2 if self.gated_mlp else 1), self.hidden_size),
            (self.hidden_size, self.intermediate_size),
        )

    @property
    def num_matrix_parameters(self) -> int:
        """Parameters of all matrix products and embedding tables, a tied one counted once."""
        heads = self.num_heads + 2 * self.num_kv_heads
        attention = self.hidden_size * self.head_dim * (heads + self.num_heads)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.gated_mlp else 2)
        tables = self.vocab_size * (1 if self.tie_word_embeddings else 2)
        tables += 0 if self.rope else self.max_position_embeddings
        return self.num_layers * (attention + mlp) + tables * self.hidden_size

    @property
    def largest_matrix(self) -> int:
        """Parameters of the largest matrix that is stored as one."""
        return max(self.vocab_size * self.hidden_size, *map(math.prod, self.linear_shapes))

    @property
    def num_vector_parameters(self) -> int:
        """Parameters of norms and biases; they stay float32 whatever the dtype."""
        norm = self.hidden_size * (2 if self.layer_norm else 1)
        layer = 2 * norm
        if self.qk_norm:
            layer += 2 * self.head_dim
        if self.qkv_bias:
            layer += (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        if self.o_bias:
            layer += self.hidden_size
        if self.mlp_bias:
            layer += self.hidden_size + self.intermediate_size * (2 if self.gated_mlp else 1)
        return self.num_layers * layer + norm

    def num_parameters(self) -> int:
        """Exact number of parameters, as a model card counts them."""
        return self.num_matrix_parameters + self.num_vector_parameters

    def weight_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Memory of the weights stored as `dtype`. A tied table is held once, as the output head holds it. A
        quantisation leaves the tables that only give rows in `dtype`."""
        rows = (0 if self.tie_word_embeddings else self.vocab_size) + (0 if self.rope else self.max_position_embeddings)
        tables = rows * self.hidden_size * DTYPE_BYTES[dtype]
        return self.packed_bytes(dtype, quantization) + tables + self.num_vector_parameters * _FLOAT32_BYTES

    def packed_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Of `weight_bytes`, those of the dense layers and the output head."""
        head = (self.vocab_size, self.hidden_size)
        if quantization is not None:
            method = METHODS[quantization]
            layer = sum(method.layers.weight_bytes(*shape) for shape in self.linear_shapes)
            return self.num_layers * layer + method.head.weight_bytes(*head)
        layer = sum(map(math.prod, self.linear_shapes))
        return (self.num_layers * layer + math.prod(head)) * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token in all layers; of int8 with a float32 scale for each."""
        scale = _FLOAT32_BYTES if dtype == "int8" else 0
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * KV_DTYPE_BYTES[dtype] + scale)

    def activation_bytes(self, num_tokens: int, num_logits: int) -> int:
        """Peak of a step that computes `num_tokens` and samples from `num_logits` rows of logits."""
        attention = self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = self.intermediate_size * (3 if self.gated_mlp else 2)
        token = 3 * self.hidden_size + max(attention, mlp)
        # Sampling works on a second copy of the logits.
        logits = 2 * self.vocab_size + self.hidden_size
        return (num_tokens * token + num_logits * logits) * _FLOAT32_BYTES


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises `CheckpointError` where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _stores_only_kv_scales(quantization: dict[str, Any]) -> bool:
    """Whether the weights are what they always are, and beside them lie scales of an 8-bit float KV cache."""
    scheme = quantization.get("kv_cache_scheme") or {}
    return (
        quantization.get("quant_method") == "compressed-tensors"
        and not quantization.get("config_groups")
        and (scheme.get("type"), scheme.get("num_bits"), bool(scheme.get("dynamic"))) == ("float", 8, False)
    )


class _Reader:
    """config.json with its defaults, read key by key; every refusal names file, key, value and what is supported."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.architecture = self._architecture(config)
        row = ARCHITECTURES[self.architecture]
        self.names = row.names
        self.config = {**row.implied, **config}
        for key, supported in row.fixed.items():
            if self.config.get(key, supported) != supported:
                raise self._refuse(key, self.config[key], json.dumps(supported))
        if self.config.get("quantization_config") and not _stores_only_kv_scales(self.config["quantization_config"]):
            method = self.config["quantization_config"].get("quant_method", "unnamed")
            raise self._refuse("quantization_config", method, "float32, float16 and bfloat16 weights")

    def model_config(self) -> ModelConfig:
        hidden_size = self._integer("hidden_size")
        num_layers = self._integer("num_hidden_layers")
        num_heads = self._integer("num_attention_heads")
        num_kv_heads = self._integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise self._refuse("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads {num_heads}")
        if self._value("head_dim") is None and hidden_size % num_heads:
            raise self._refuse("hidden_size", hidden_size, f"a multiple of num_attention_heads {num_heads}")
        max_position = self._integer("max_position_embeddings")
        bias = bool(self.config.get("attention_bias"))
        return ModelConfig(
            architecture=self.architecture,
            vocab_size=self._integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self._integer("intermediate_size", 4 * hidden_size),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self._integer("head_dim", hidden_size // num_heads),
            max_position_embeddings=max_position,
            norm_eps=self._number("rms_norm_eps", 1e-6),
            activation=ACTIVATIONS[self._choice("hidden_act", tuple(ACTIVATIONS), "silu")],
            gated_mlp=bool(self.config.get("gated_mlp", True)),
            layer_norm=bool(self.config.get("layer_norm")),
            qk_norm=bool(self.config.get("qk_norm")),
            qkv_bias=bool(self.config.get("qkv_bias", bias)),
            o_bias=bias,
            mlp_bias=bool(self.config.get("mlp_bias")),
            tie_word_embeddings=bool(self.config.get("tie_word_embeddings")),
            rope=None if self.config.get("learned_positions") else self._rope(max_position),
            layer_windows=self._layer_windows(num_layers),
            checkpoint_dtype=self._checkpoint_dtype(),
            bos_token_id=self.config.get("bos_token_id"),
            eos_token_ids=self._end_tokens(),
        )

    def _architecture(self, config: dict[str, Any]) -> str:
        named = config.get("architectures") or []
        for name in named:
            if name in ARCHITECTURES:
                return str(name)
        found = ", ".join(map(str, named)) or f"none (model_type {config.get('model_type')!r})"
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{self.path}: architectures is {found}; supported are {supported}")

    def _rope(self, max_position: int) -> RopeConfig:
        # transformers 5 writes rope_parameters, earlier ones rope_theta beside rope_scaling.
        section = "rope_parameters" if self.config.get("rope_parameters") else "rope_scaling"
        values: dict[str, Any] = dict(self.config.get(section) or {})
        rope_type = values.get("rope_type", values.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise self._refuse(f"{section}.rope_type", rope_type, ", ".join(ROPE_TYPES))

        def number(key: str, default: float | None = None) -> float:
            value = values.get(key, default)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise self._refuse(f"{section}.{key}", value, "a positive number")
            return float(value)

        def optional(key: str) -> float | None:
            return None if values.get(key) is None else number(key)

        original = self.config.get("original_max_position_embeddings")
        original = int(number("original_max_position_embeddings", original or max_position))
        # Dynamic scaling begins where max_position_embeddings ends; the others say what the training length was.
        original = max_position if rope_type == "dynamic" else original
        needs_factor = rope_type in ("linear", "dynamic", "llama3")
        return RopeConfig(
            theta=number("rope_theta", self.config.get("rope_theta") or 10000.0),
            rope_type=rope_type,
            factor=number("factor", None if needs_factor else max_position / original),
            original_max_position=original,
            low_freq_factor=number("low_freq_factor", None if rope_type == "llama3" else 1.0),
            high_freq_factor=number("high_freq_factor", None if rope_type == "llama3" else 4.0),
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=bool(values.get("truncate", True)),
            attention_factor=optional("attention_factor"),
            mscale=optional("mscale"),
            mscale_all_dim=optional("mscale_all_dim"),
            partial_rotary_factor=number("partial_rotary_factor", self.config.get("partial_rotary_factor") or 1.0),
        )

    def _layer_windows(self, num_layers: int) -> tuple[int, ...]:
        window = self.config.get("sliding_window") if self.config.get("use_sliding_window") else None
        if window is None:
            return (0,) * num_layers
        window = self._integer("sliding_window")
        layer_types = self.config.get("layer_types")
        if layer_types is None:
            first = self._integer("max_window_layers", 28, minimum=0)
            return tuple(window if layer >= first else 0 for layer in range(num_layers))
        windows = {"full_attention": 0, "sliding_attention": window}
        if len(layer_types) != num_layers or not set(layer_types) <= windows.keys():
            raise self._refuse("layer_types", layer_types, f"{num_layers} times one of {', '.join(windows)}")
        return tuple(windows[layer_type] for layer_type in layer_types)

    def _checkpoint_dtype(self) -> str:
        key = "dtype" if self.config.get("dtype") else "torch_dtype"
        if self.config.get(key) is None:
            return "float32"
        return self._choice(key, tuple(DTYPE_BYTES))

    def _end_tokens(self) -> tuple[int, ...]:
        value = self.config.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in ids):
            raise self._refuse("eos_token_id", value, "a token id or a list of them")
        return tuple(ids)

    def _value(self, key: str) -> Any:
        return self.config.get(self.names.get(key, key))

    def _integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._refuse(key, value, f"an integer of at least {minimum}")
        return value

    def _number(self, key: str, default: float) -> float:
        value = self._value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self._refuse(key, value, "a positive number")
        return float(value)

    def _choice(self, key: str, supported: tuple[str, ...], default: str | None = None) -> str:
        value = self._value(key)
        value = default if value is None else value
        if value not in supported:
            raise self._refuse(key, value, ", ".join(supported))
        return str(value)

    def _refuse(self, key: str, value: Any, supported: str) -> CheckpointError:
        key = self.names.get(key, key)
        shown = "missing" if value is None else json.dumps(value)
        return CheckpointError(f"{self.path}: {key} is {shown}; supported: {supported}")
