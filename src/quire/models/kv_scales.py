"""KVScales: divisors of keys and values before a float8 cache stores them, one number for each KV head.

A checkpoint may bring measured scales. Else they are computed from the weights alone: a layer projects a norm's output,
whose length is known, so no key or value can be larger than a bound (Cauchy and Schwarz), and the scale lets that bound
just fit. float8 keeps its precision far below its largest number, so a bound that no value comes near costs nothing.
Decision 0026 says why not otherwise.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.layers.linear import Linear
from quire.models.weights import WeightScope

LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)
_NAMES = (("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale"))


class KVScales(NamedTuple):
    """The scales of one layer, [num_kv_heads] float32 each."""

    keys: Tensor
    values: Tensor


def take_kv_scales(weights: WeightScope, num_kv_heads: int) -> KVScales | None:
    """The scales that a checkpoint has beside an attention's weights: one for the layer, or one for each head."""
    for names in _NAMES:
        if all(map(weights.has, names)):
            keys, values = (_take(weights, name, num_kv_heads) for name in names)
            return KVScales(keys, values)
    return None


def _take(weights: WeightScope, name: str, num_own: int) -> Tensor:
    shards = weights.shards
    num_kv_heads = num_own if shards is None else shards.num_rows((("kv", num_own),))
    shape = weights.shape_of(name)
    scales = weights.take(name, shape).float().flatten()
    if len(scales) not in (1, num_kv_heads) or not bool((scales > 0).all() & scales.isfinite().all()):
        raise CheckpointError(
            f"tensor {name} has shape {list(shape)} and values from {scales.min().item():g}; expected one positive "
            f"number, or {num_kv_heads}, one for each KV head"
        )
    if weights.shards is not None and len(scales) > 1:
        scales = weights.shards.kv_heads(scales, num_own)
    return scales.expand(num_own).contiguous()


def largest_projected(layer: Linear, norm_weight: Tensor, norm_bias: Tensor | None = None) -> Tensor:
    """The largest magnitudes [N] of a layer's outputs if its input is a norm with this weight and bias [H].

    A row that is normed by its root mean square, or to variance 1, has length sqrt(H) at most. A weight that a family
    stores without its offset of 1 must have the offset here.
    """
    assert isinstance(layer.packed, Tensor), "weights of few bits have no bounds"
    weight = layer.packed.float()
    bound: Tensor = (weight * norm_weight.float()).norm(dim=1) * math.sqrt(weight.shape[1])
    constant = torch.zeros_like(bound) if layer.bias is None else layer.bias.clone()
    if norm_bias is not None:
        constant += weight @ norm_bias.float()
    bound += constant.abs()
    return bound


def largest_rotated(bounds: Tensor, cos_sin: Tensor | None) -> Tensor:
    """bounds [heads, D] of vectors -> those of the vectors rotated by any row of a table (`reference.rotary_`)."""
    if cos_sin is None:
        return bounds
    rotary_dim = cos_sin.shape[1]
    stretch = cos_sin.float().unflatten(1, (2, -1)).norm(dim=1).max()
    pair = bounds[:, :rotary_dim].unflatten(1, (2, -1)).norm(dim=1) * stretch
    return torch.cat((pair, pair, bounds[:, rotary_dim:]), dim=1)


def scales_of(bounds: Tensor) -> Tensor:
    """bounds [heads, D] -> the least powers of two [heads] that keep every value inside float8."""
    highest = bounds.amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.exp2((highest / LARGEST).log2().ceil().clamp(-64, 64))
