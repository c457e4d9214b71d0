"""What model families share: embedding and output head, a fused linear layer from several tensors, the gated MLP."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from quire.kernels import Kernels
from quire.layers.embedding import Embedding, TiedEmbedding
from quire.layers.linear import Linear, output_head
from quire.layers.norm import RMSNorm
from quire.layers.step_context import StepContext
from quire.model_config import ModelConfig
from quire.models.weights import TensorSource


def embedding_and_head(
    config: ModelConfig, table: Tensor, weights: TensorSource, kernels: Kernels, dtype: str
) -> tuple[Embedding | TiedEmbedding, Linear]:
    """The two ends of a model, of the embedding's `table` [vocab_size, H] and, where they are not tied, lm_head."""
    if config.tie_word_embeddings:
        head = output_head(kernels, table, dtype)
        return TiedEmbedding(head), head
    return Embedding(table, weights.activations), output_head(
        kernels, weights.take("lm_head.weight", tuple(table.shape)), dtype
    )


def fused_linear(
    weights: TensorSource, rows: Mapping[str, int], in_features: int, *, bias: bool, kernels: Kernels, dtype: str
) -> Linear:
    """One layer whose output is that of several, side by side; `rows` maps their names to their output sizes."""
    matrices = [weights.take(f"{name}.weight", (n, in_features)) for name, n in rows.items()]
    biases = [weights.take(f"{name}.bias", (n,)) for name, n in rows.items()] if bias else []
    return Linear(kernels, matrices, torch.cat(biases) if biases else None, dtype)


class DecoderBlock(Protocol):
    def __call__(self, residual: Tensor, update: Tensor | None, context: StepContext) -> tuple[Tensor, Tensor]:
        """residual, update [T, H] -> the same behind the layer, [T, H], or [R, H] of the output tokens."""
        ...


def run_layers(
    layers: Sequence[DecoderBlock], residual: Tensor, update: Tensor | None, context: StepContext
) -> tuple[Tensor, Tensor | None]:
    """The residual stream and its last update behind all layers; the last layer leaves the output tokens alone."""
    inner = context.for_inner_layers
    for layer in layers[:-1]:
        residual, update = layer(residual, update, inner)
    return layers[-1](residual, update, context)


class GatedMLP:
    """down(activation(gate(x)) * up(x)), where x is the norm of the residual stream."""

    __slots__ = ("activation", "down", "gate_up", "norm")

    def __init__(self, config: ModelConfig, weights: TensorSource, kernels: Kernels, dtype: str, norm: RMSNorm) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.norm = norm
        self.gate_up = fused_linear(
            weights, {"gate_proj": inner, "up_proj": inner}, hidden, bias=bias, kernels=kernels, dtype=dtype
        )
        self.activation = config.activation
        self.down = fused_linear(weights, {"down_proj": hidden}, inner, bias=bias, kernels=kernels, dtype=dtype)

    def __call__(self, residual: Tensor, update: Tensor) -> Tensor:
        """residual, update [T, H] -> the next update [T, H]; `update` is added to `residual`."""
        return self.down.after_gate(self.gate_up.after_norm(self.norm, residual, update), self.activation)
