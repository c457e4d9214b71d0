"""ModelShape: a model's spec and how it is stored; a table of published models, or a config.json."""

from dataclasses import dataclass
from pathlib import Path

from quire.dtypes import DTYPE_BYTES
from quire.errors import ConfigError
from quire.kv_groups import KVLayout
from quire.layer_spec import ModelSpec
from quire.model_config import ModelConfig, RopeConfig
from quire.quantization import METHODS


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """One decoder-only model as a simulation sees it. `spec` has all that follows from its layers alone."""

    name: str
    spec: ModelSpec
    context_length: int
    dtype: str = "float16"
    """Type of parameters that are not quantised, and of activations that pass between devices."""
    kv_dtype: str | None = None
    """Type of keys and values; None follows dtype."""
    quantization: str | None = None
    """A row of METHODS: how the matrices of the layers and the head are stored instead."""
    weight_share: float = 1.0
    """Bytes that the weights take, by those that `dtype` and `quantization` say: less for a checkpoint of few bits."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        name: str,
        *,
        dtype: str | None = None,
        kv_dtype: str | None = None,
        quantization: str | None = None,
    ) -> "ModelShape":
        """The shape of a checkpoint, stored as asked."""
        return cls(
            name=name,
            spec=config.spec,
            context_length=config.context_length,
            dtype=dtype or config.checkpoint_dtype,
            kv_dtype=kv_dtype,
            quantization=quantization,
        )

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def weight_format(self) -> str:
        """How the layers' matrices are stored: a quantisation, or a dtype. A checkpoint of few bits counts as the
        quantisation of about as many."""
        bytes_per_parameter = self.weight_share * self.dtype_bytes
        if self.quantization is None and bytes_per_parameter < 1.5:
            return "int4" if bytes_per_parameter < 0.75 else "int8"
        return self.quantization or self.dtype

    @property
    def head_format(self) -> str:
        """How the head is stored: the name of the method whose layers are stored that way, or a dtype."""
        if self.quantization is None:
            return self.dtype
        head = METHODS[self.quantization].head
        return next(name for name, method in METHODS.items() if method.layers == head)

    @property
    def layer_bytes(self) -> int:
        """Memory of the layers' matrices."""
        return self.spec.layer_bytes(self.dtype, self.quantization)

    @property
    def head_bytes(self) -> int:
        """Memory of the matrix that makes logits."""
        return self.spec.head_bytes(self.dtype, self.quantization)

    @property
    def weight_bytes(self) -> int:
        """Memory of all matrices and tables; norms and biases are too small to count."""
        return self.spec.matrix_bytes(self.dtype, self.quantization)

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one token's keys and values in all layers."""
        return self.spec.kv_bytes_per_token(self.kv_dtype or self.dtype)

    @property
    def kv_layout(self) -> KVLayout:
        """Its KV groups."""
        return KVLayout.of(self.spec)

    def block_bytes(self, block_size: int) -> int:
        """Memory of one KV block: of the layers of one group."""
        return self.kv_layout.block_bytes(block_size, self.kv_dtype or self.dtype)


def _opt(name: str, num_layers: int, hidden_size: int, num_heads: int) -> tuple[str, ModelConfig]:
    # Zhang et al. 2022, table 1; logits come from the embedding table.
    return name, ModelConfig(
        architecture="OPTForCausalLM",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=4 * hidden_size,
        vocab_size=50272,
        max_position_embeddings=2048,
        gated_mlp=False,
        tie_word_embeddings=True,
    )


_PUBLISHED: dict[str, ModelConfig] = dict(
    (
        _opt("OPT-13B", 40, 5120, 40),
        _opt("OPT-66B", 64, 9216, 72),
        _opt("OPT-175B", 96, 12288, 96),
        (
            "LLaMA-13B",
            ModelConfig(
                architecture="LlamaForCausalLM",
                num_layers=40,
                hidden_size=5120,
                num_heads=40,
                num_kv_heads=40,
                head_dim=128,
                intermediate_size=13824,
                vocab_size=32000,
                max_position_embeddings=2048,
                rope=RopeConfig(),
            ),
        ),
        (
            "Llama-3.1-8B",
            ModelConfig(
                architecture="LlamaForCausalLM",
                num_layers=32,
                hidden_size=4096,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                intermediate_size=14336,
                vocab_size=128256,
                max_position_embeddings=131072,
                rope=RopeConfig(),
            ),
        ),
        (
            "Qwen3-32B",
            ModelConfig(
                architecture="Qwen3ForCausalLM",
                num_layers=64,
                hidden_size=5120,
                num_heads=64,
                num_kv_heads=8,
                head_dim=128,
                intermediate_size=25600,
                vocab_size=151936,
                max_position_embeddings=40960,
                rope=RopeConfig(),
            ),
        ),
        (
            "Qwen3-0.6B",
            ModelConfig(
                architecture="Qwen3ForCausalLM",
                num_layers=28,
                hidden_size=1024,
                num_heads=16,
                num_kv_heads=8,
                head_dim=128,
                intermediate_size=3072,
                vocab_size=151936,
                max_position_embeddings=40960,
                tie_word_embeddings=True,
                rope=RopeConfig(),
            ),
        ),
    )
)
"""Name → sizes that matrices, KV cache and context follow from; norms and biases are left out."""

MODEL_SHAPES = {name: ModelShape.of(config, name, dtype="float16") for name, config in _PUBLISHED.items()}


def find_model_shape(name: str) -> ModelShape:
    """A published model (case does not matter), or that of a config.json or its folder.

    Raises `ConfigError` for a name that is neither, `CheckpointError` for a config.json that is not supported.
    """
    for known, shape in MODEL_SHAPES.items():
        if known.lower() == name.lower():
            return shape
    path = Path(name)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model is {name!r}; it must be one of {', '.join(MODEL_SHAPES)}, or a config.json or its folder"
        )
    return ModelShape.of(ModelConfig.from_folder(folder), folder.resolve().name)
