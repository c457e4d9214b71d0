"""ModelShape: what a step's time and the KV memory depend on of a model; a table of known ones, or a config.json."""

from dataclasses import dataclass
from pathlib import Path

from quire.errors import ConfigError
from quire.model_config import DTYPE_BYTES, KV_DTYPE_BYTES, ModelConfig
from quire.quantization import METHODS

_SCALE_BYTES = 4
"""Of a key or value stored in int8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of one decoder-only model."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    gated_mlp: bool = True
    tied: bool = False
    learned_positions: bool = False
    dtype: str = "float16"
    """What parameters are stored in, where they are not quantised, and activations pass between devices in."""
    kv_dtype: str | None = None
    """What keys and values are stored in; None follows dtype."""
    quantization: str | None = None
    """A row of METHODS: how the matrices of the layers and the head are stored instead."""

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
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            gated_mlp=config.gated_mlp,
            tied=config.tie_word_embeddings,
            learned_positions=config.rope is None,
            dtype=dtype or config.checkpoint_dtype,
            kv_dtype=kv_dtype,
            quantization=quantization,
        )

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def weight_format(self) -> str:
        """How the layers' matrices are stored: a quantisation, or a dtype."""
        return self.quantization or self.dtype

    @property
    def head_format(self) -> str:
        """How the matrix that makes logits is stored: by the method whose layers are stored that way."""
        if self.quantization is None:
            return self.dtype
        head = METHODS[self.quantization].head
        return next(name for name, method in METHODS.items() if method.layers == head)

    @property
    def layer_bytes(self) -> float:
        """Memory of the layers' matrices, which every step reads."""
        return self.num_layer_parameters * self._bytes_per_parameter(head=False)

    @property
    def head_bytes(self) -> float:
        """Memory of the matrix that makes logits."""
        return self.num_head_parameters * self._bytes_per_parameter(head=True)

    def _bytes_per_parameter(self, *, head: bool) -> float:
        if self.quantization is None:
            return self.dtype_bytes
        method = METHODS[self.quantization]
        # A row of `hidden_size` inputs with its scales; other widths differ by a scale.
        return (method.head if head else method.layers).weight_bytes(1, self.hidden_size) / self.hidden_size

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of the layers' matrices: every token passes through them."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.gated_mlp else 2)
        return self.num_layers * (attention + mlp)

    @property
    def num_head_parameters(self) -> int:
        """Parameters of the matrix that makes logits: only sampled positions pass through it."""
        return self.vocab_size * self.hidden_size

    @property
    def num_elements_per_token(self) -> int:
        """What the layers pass to each other for one token: twice a norm's output, queries, keys, values, attention's
        output, and what goes into and comes out of the activation."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        mlp = self.intermediate_size * (3 if self.gated_mlp else 2)
        return self.num_layers * (2 * self.hidden_size + heads + mlp)

    @property
    def weight_bytes(self) -> int:
        """Memory of all matrices and tables; norms and biases are too small to count."""
        tables = 0 if self.tied and self.quantization is None else self.num_head_parameters
        if self.learned_positions:
            tables += self.context_length * self.hidden_size
        return int(self.layer_bytes + self.head_bytes) + tables * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        kv_dtype = self.kv_dtype or self.dtype
        scale = _SCALE_BYTES if kv_dtype == "int8" else 0
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * KV_DTYPE_BYTES[kv_dtype] + scale)


def _opt(name: str, num_layers: int, hidden_size: int, num_heads: int) -> ModelShape:
    # Zhang et al. 2022, table 1; logits come from the embedding table.
    return ModelShape(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=4 * hidden_size,
        vocab_size=50272,
        context_length=2048,
        gated_mlp=False,
        tied=True,
        learned_positions=True,
    )


MODEL_SHAPES = {
    shape.name: shape
    for shape in (
        _opt("OPT-13B", 40, 5120, 40),
        _opt("OPT-66B", 64, 9216, 72),
        _opt("OPT-175B", 96, 12288, 96),
        ModelShape(
            name="LLaMA-13B",
            num_layers=40,
            hidden_size=5120,
            num_heads=40,
            num_kv_heads=40,
            head_dim=128,
            intermediate_size=13824,
            vocab_size=32000,
            context_length=2048,
        ),
        ModelShape(
            name="Llama-3.1-8B",
            num_layers=32,
            hidden_size=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=14336,
            vocab_size=128256,
            context_length=131072,
        ),
        ModelShape(
            name="Qwen3-0.6B",
            num_layers=28,
            hidden_size=1024,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=3072,
            vocab_size=151936,
            context_length=40960,
            tied=True,
        ),
    )
}


def find_model_shape(name: str) -> ModelShape:
    """A known shape (case does not matter), or that of a config.json or its folder.

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
