"""ModelShape: what a step's time and the KV memory depend on of a model; a table of known ones, or a config.json."""

from dataclasses import dataclass
from pathlib import Path

from quire.errors import ConfigError
from quire.model_config import DTYPE_BYTES, ModelConfig


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
    dtype_bytes: int = 2
    """Bytes per parameter and per stored key or value."""

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
    def weight_bytes(self) -> int:
        """Memory of all matrices and tables; norms and biases are too small to count."""
        tables = self.num_head_parameters * (1 if self.tied else 2)
        if self.learned_positions:
            tables += self.context_length * self.hidden_size
        return (self.num_layer_parameters + tables) * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes


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
    config = ModelConfig.from_folder(folder)
    return ModelShape(
        name=folder.resolve().name,
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
        dtype_bytes=DTYPE_BYTES[config.checkpoint_dtype],
    )
