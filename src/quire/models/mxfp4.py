"""MXFP4: blocks of 32 numbers of 4 bits with one power of two as their scale (OCP Microscaling formats 1.0).

A number is a sign, two bits of exponent and one of mantissa (E2M1). A byte holds two of them, the first in its low
half. A scale is a byte s that stands for 2^(s - 127) (E8M0); 255 is NaN.
"""

import torch
from torch import Tensor

BLOCK = 32
"""Numbers that share a scale."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
_PAIRS = torch.stack((_VALUES.repeat(16), _VALUES.repeat_interleave(16)), dim=1)
"""[256, 2]: the two numbers of every byte."""


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks uint8 [N, K / 32, 16], scales uint8 [N, K / 32] -> the numbers, float32 [N, K]; exact."""
    numbers = _PAIRS[blocks.int()].flatten(2)
    exponents = scales.int().sub(127).unsqueeze(2)
    return torch.ldexp(numbers, exponents).masked_fill(scales.unsqueeze(2) == 255, torch.nan).flatten(1)
