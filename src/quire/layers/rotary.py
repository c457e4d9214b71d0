"""Rotary position embedding: the table of cosines and sines of every position.

The table is computed in float32, as transformers computes it, since models were trained with that rounding.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from quire.model_config import RopeConfig


def cos_sin_table(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """[num_positions, rotary_dim] float32: for each position its cosines, then its sines."""
    dim = rope.rotary_dim(head_dim)
    frequencies = _FREQUENCIES[rope.rope_type](rope, dim, num_positions)  # [dim / 2] or [num_positions, dim / 2]
    table = torch.empty(num_positions, dim)  # everything is computed in it: for long contexts it is large
    cosines, angles = table.view(num_positions, 2, dim // 2).unbind(1)
    torch.mul(torch.arange(num_positions, dtype=torch.float32).unsqueeze(1), frequencies, out=angles)
    torch.cos(angles, out=cosines)
    angles.sin_()
    return table.mul_(_attention_factor(rope, num_positions))


@lru_cache(maxsize=1)  # the layers of a model share one table
def query_scales(rope: RopeConfig | None, num_positions: int, device: torch.device) -> Tensor | None:
    """[num_positions] float32: the factors of queries, which sharpen attention beyond the training length; None where
    they are all 1."""
    if rope is None or not rope.query_scaling_beta or num_positions <= rope.original_max_position:
        return None
    lengths = torch.floor(torch.arange(num_positions, device=device) / rope.original_max_position)
    return 1 + rope.query_scaling_beta * torch.log(1 + lengths)


def half_layout(head_dim: int, rotary_dim: int, device: torch.device) -> Tensor:
    """[head_dim]: the order in which the elements of a head with interleaved pairs are those of a head in halves.

    Kernels rotate elements i and i + rotary_dim / 2 together. A family that rotates 2 i and 2 i + 1 is served by this
    order of the rows of its queries and keys: scores do not depend on the order of a head's elements.
    """
    pairs = torch.arange(rotary_dim, device=device).view(-1, 2).t().flatten()
    return torch.cat((pairs, torch.arange(rotary_dim, head_dim, device=device)))


def _unscaled(theta: float | Tensor, dim: int) -> Tensor:
    """theta ** (-2i / dim) for i from 0 to dim / 2 - 1."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return torch.as_tensor(1.0 / theta**exponents)


def _default(rope: RopeConfig, dim: int, num_positions: int) -> Tensor:
    return _unscaled(rope.theta, dim)


def _linear(rope: RopeConfig, dim: int, num_positions: int) -> Tensor:
    return _unscaled(rope.theta, dim) / rope.factor


def _dynamic(rope: RopeConfig, dim: int, num_positions: int) -> Tensor:
    """The base grows with the length, so it is a function of each position: that of a sequence which ends there.

    So a key's rotation does not depend on how its prompt was cut into steps, which a paged, shared cache needs. It is
    what transformers computes token by token; transformers rotates a longer prompt in one piece by its whole length.
    """
    lengths = torch.arange(1, num_positions + 1).clamp(min=rope.original_max_position).unsqueeze(1)
    stretch = rope.factor * lengths / rope.original_max_position - (rope.factor - 1)
    return _unscaled(rope.theta * stretch ** (dim / (dim - 2)), dim)


def _llama3(rope: RopeConfig, dim: int, num_positions: int) -> Tensor:
    """Stretch long waves by the factor, keep short ones, and blend the waves between."""
    frequencies = _unscaled(rope.theta, dim)
    waves_in_training = rope.original_max_position * frequencies / (2 * math.pi)
    kept = (waves_in_training - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blend(frequencies / rope.factor, frequencies, kept.clamp(0, 1))


def _yarn(rope: RopeConfig, dim: int, num_positions: int) -> Tensor:
    """Like llama3, with the blend linear in the dimension instead of the wave length (arXiv 2309.00071)."""

    def dimension_with(rotations: float) -> float:
        """The (fractional) dimension that makes `rotations` turns over the training length."""
        return dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    frequencies = _unscaled(rope.theta, dim)
    return _blend(frequencies / rope.factor, frequencies, 1 - stretched)


def _longrope(rope: RopeConfig, dim: int, num_positions: int) -> Tensor:
    """Every frequency has a divisor of its own, one for short and one for long contexts (arXiv 2402.13753)."""
    factors = rope.long_factors if rope.is_long(num_positions) else rope.short_factors
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents)


def _blend(a: Tensor, b: Tensor, share_of_b: Tensor) -> Tensor:
    return a * (1 - share_of_b) + b * share_of_b


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _attention_factor(rope: RopeConfig, num_positions: int) -> float:
    """Factor of queries and keys, which keeps the entropy of attention over longer contexts: yarn's or longrope's."""
    mscale = rope.long_mscale if rope.is_long(num_positions) else rope.short_mscale
    if mscale is not None:
        return mscale
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type not in ("yarn", "longrope") or rope.factor <= 1:
        return 1.0
    if rope.rope_type == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))
    growth = 0.1 * math.log(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return (growth * rope.mscale + 1) / (growth * rope.mscale_all_dim + 1)
    return growth + 1
