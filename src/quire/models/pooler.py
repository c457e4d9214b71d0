"""Pooler: from the hidden states of texts to their vectors: pooling, then a classification head or Dense modules.

n texts, R output tokens, H hidden size. All of it is float32: it computes one row a text, so its time does not count.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from quire.layers.activation import activation_function
from quire.model_config import ModelConfig
from quire.model_config.pooling import DenseModule
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.weights import WeightScope

Step = Callable[[Tensor], Tensor]
"""Rows [n, inputs] -> [n, outputs]."""


class Pooler:
    """Called with the hidden states of whole texts."""

    def __init__(self, methods: Sequence[str], steps: Sequence[Step]) -> None:
        """`methods` are of POOLINGS; `steps` follow in their order."""
        self.methods = tuple(methods)
        self.steps = list(steps)

    @property
    def reads_all_tokens(self) -> bool:
        """Whether hidden states of tokens before the last are read."""
        return self.methods != ("last",)

    def __call__(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """hidden [R, H] of the texts' tokens one after the other, or of their last tokens alone; lengths int64 [n], how
        many rows each has -> vectors [n, size] float32."""
        ends = lengths.cumsum(0)
        pooled = [_pool(method, hidden, lengths, ends) for method in self.methods]
        vectors = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
        for step in self.steps:
            vectors = step(vectors)
        return vectors


def make_pooler(config: ModelConfig, weights: WeightScope, logits: Callable[[Tensor], Tensor]) -> Pooler | None:
    """The pooler of a model; None for one that generates. `logits` are those of the model's own head. Raises
    `CheckpointError` for tensors that are missing or misshapen."""
    pooling = config.pooling
    if pooling is None:
        return None
    steps = [_dense_module(module, weights) for module in pooling.dense]
    if pooling.token_ids:
        token_ids = list(pooling.token_ids)
        dtype = weights.activation_dtype
        steps.append(lambda vectors: logits(vectors.to(dtype))[:, token_ids].float())
    elif pooling.num_labels:
        steps += _classification_head(config, weights, pooling.num_labels)
    return Pooler(pooling.methods, steps)


def _pool(method: str, hidden: Tensor, lengths: Tensor, ends: Tensor) -> Tensor:
    """[R, H] -> [n, H] float32."""
    if method == "last":
        return hidden[ends - 1].float()
    if method == "cls":
        return hidden[ends - lengths].float()
    hidden = hidden.float()
    if method in ("mean", "max"):
        pooled: Tensor = torch.segment_reduce(hidden, method, lengths=lengths, axis=0)
        return pooled
    if method == "mean_sqrt_len":
        return torch.segment_reduce(hidden, "sum", lengths=lengths, axis=0) / lengths.sqrt().unsqueeze(1)
    places = torch.arange(len(hidden), device=hidden.device) - torch.repeat_interleave(ends - lengths, lengths)
    weights = (places + 1).float().unsqueeze(1)
    total = torch.segment_reduce(weights, "sum", lengths=lengths, axis=0)
    return torch.segment_reduce(hidden * weights, "sum", lengths=lengths, axis=0) / total


def _dense_module(module: DenseModule, weights: WeightScope) -> Step:
    """A Dense module, whose tensors lie in a folder of their own."""
    source = open_checkpoint(Path(module.folder))
    weight = source.take("linear.weight", (module.num_outputs, module.num_inputs))
    bias = source.take("linear.bias", (module.num_outputs,)) if module.has_bias else None
    source.finish()
    device = weights.source.device if hasattr(weights.source, "device") else torch.device("cpu")
    return _dense(weight.to(device), None if bias is None else bias.to(device), module.activation)


def _classification_head(config: ModelConfig, weights: WeightScope, num_labels: int) -> list[Step]:
    """The head by the names of tensors that the checkpoint has: `score` of decoders, RoBERTa's `classifier.dense` and
    `out_proj`, or `classifier` behind what comes before it in BERT, DistilBERT and ModernBERT."""
    hidden = config.hidden_size

    def take(name: str, num_outputs: int, activation: str = "") -> Step:
        weight = weights.take(f"{name}.weight", (num_outputs, hidden))
        bias = weights.take(f"{name}.bias", (num_outputs,)) if weights.has(f"{name}.bias") else None
        return _dense(weight, bias, activation)

    if weights.has("score.weight"):
        return [take("score", num_labels)]
    if weights.has("classifier.out_proj.weight"):
        return [take("classifier.dense", hidden, "tanh"), take("classifier.out_proj", num_labels)]
    if weights.has("pre_classifier.weight"):
        return [take("pre_classifier", hidden, "relu"), take("classifier", num_labels)]
    if weights.has("head.dense.weight"):
        norm = weights.take("head.norm.weight", (hidden,)).float()
        bias = weights.take("head.norm.bias", (hidden,)).float() if weights.has("head.norm.bias") else None
        dense = take("head.dense", hidden, "gelu")

        def normed(vectors: Tensor) -> Tensor:
            return functional.layer_norm(dense(vectors), (hidden,), norm, bias, config.norm_eps)

        return [normed, take("classifier", num_labels)]
    for pooler in ("bert.pooler.dense", "nomic_bert.pooler.dense", "new.pooler.dense", "gte.pooler.dense"):
        if weights.has(f"{pooler}.weight"):
            return [take(pooler, hidden, "tanh"), take("classifier", num_labels)]
    return [take("classifier", num_labels)]


def _dense(weight: Tensor, bias: Tensor | None, activation: str) -> Step:
    weight, bias = weight.float(), None if bias is None else bias.float()
    functions: dict[str, Step] = {"": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
    function = functions.get(activation) or activation_function(activation)
    return lambda vectors: function(functional.linear(vectors, weight, bias))
