"""distance_biases: what encoders without rotary embeddings add to a score by the distance of key and query."""

import math

import torch
from torch import Tensor

from quire.model_config import ModelConfig
from quire.models.weights import WeightScope

_FARTHEST = 128
"""Distance from which on all keys of a side share a bucket (MPNet)."""


def distance_biases(config: ModelConfig, weights: WeightScope, longest: int) -> Tensor | None:
    """[num_heads, 2 * longest - 1] float32, of the keys from `longest` - 1 before a query to as many behind it: learned
    (MPNet), or a slope on both sides (JinaBERT). None for a model whose attention knows no distances."""
    distances = torch.arange(1 - longest, longest)
    if config.num_distance_buckets:
        shape = (config.num_distance_buckets, config.num_heads)
        table = weights.take("encoder.relative_attention_bias.weight", shape).float()
        return table[_buckets(distances, shape[0]).to(table.device)].t().contiguous()
    if not config.alibi_slopes:
        return None
    device = getattr(weights.source, "device", torch.device("cpu"))
    return (-torch.tensor(config.alibi_slopes)[:, None] * distances.abs()).to(device)


def _buckets(distances: Tensor, num_buckets: int) -> Tensor:
    """The bucket of each distance. Half of them are for keys behind the query; of each half, short distances have one
    each, and the others share the rest in steps that grow."""
    half = num_buckets // 2
    exact = half // 2
    far = distances.abs().clamp(min=1)
    grown = exact + (torch.log(far / exact) / math.log(_FARTHEST / exact) * (half - exact)).long()
    bucket = torch.where(far < exact, distances.abs(), grown.clamp(max=half - 1))
    return bucket + half * (distances > 0)
