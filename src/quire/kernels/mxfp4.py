"""MXFP4 in plain PyTorch: the numbers that stored bits stand for."""

import torch
from torch import Tensor

from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.interface import Mxfp4Matrix

MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the numbers of the codes 0 to 7; codes 8 to 15 are their negatives."""


def doubled(blocks: Tensor) -> Tensor:
    """blocks [..., K / 32, 16] uint8 -> twice the numbers [..., K] int8."""
    numbers = torch.tensor([*MAGNITUDES, *(-each for each in MAGNITUDES)], dtype=torch.int8, device=blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-3)
    return numbers[codes.int()]


def as_blocks(matrix: Mxfp4Matrix) -> BlockMatrix:
    """The same bits in GGUF's blocks: a scale, then inputs 0 to 15 in the low halves of 16 bytes and 16 to 31 in the
    high ones."""
    codes = torch.stack((matrix.blocks & 15, matrix.blocks >> 4), dim=-1).flatten(-2)
    halves = codes[..., :16] | codes[..., 16:] << 4
    return BlockMatrix(torch.cat((matrix.scales.unsqueeze(-1), halves), dim=-1).flatten(1), "MXFP4")


def powers_of_two(scales: Tensor) -> Tensor:
    """scales [...] uint8 -> 2^(e - 127) [...] float32; 255 is NaN."""
    exponents = scales.int() - 127
    powers: Tensor = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    powers[scales == 255] = torch.nan
    return powers


def dequantize(matrix: Mxfp4Matrix) -> Tensor:
    """[N, K] float32; every number is exact."""
    numbers = doubled(matrix.blocks).float().unflatten(-1, (-1, 32))
    scaled: Tensor = numbers * (powers_of_two(matrix.scales) * 0.5).unsqueeze(-1)
    return scaled.flatten(-2)
