"""What dense layers of GGUF's blocks compute, in plain PyTorch: the specification of `csrc/gguf_linear.h`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.kernels.block_matrix import BlockMatrix, BlockWeight
from quire.kernels.blocks import decode, dequantize

INPUTS_PER_SCALE = 32
"""Inputs of a row that share a scale when they are brought to 16 bits."""
_LARGEST = 32767


def keep_blocks(matrices: Sequence[BlockMatrix]) -> BlockWeight:
    """matrices [N_i, K], whose outputs lie side by side -> one weight with their bits."""
    return BlockWeight(tuple(matrices))


def linear_blocks(x: Tensor, weight: BlockWeight, bias: Tensor | None) -> Tensor:
    """x [M, K], a weight of N outputs, bias [N] -> x weight^T + bias [M, N].

    Every run of 32 inputs becomes integers from -32767 to 32767 and a scale, by the rules of `quantize_rows`. Products
    of integers are summed exactly inside a group of the weight; so are the integers of the row, which the group's
    offset multiplies.
    """
    runs = x.unflatten(1, (-1, INPUTS_PER_SCALE))
    magnitude = runs.abs().amax(-1, keepdim=True)
    finite = magnitude.isfinite()
    inverse = torch.where(finite & (magnitude >= 2.0**-100), torch.full_like(magnitude, _LARGEST) / magnitude, 0.0)
    integers = (torch.where(finite, runs, 0.0) * inverse).round().double().flatten(1)
    scales = torch.where(finite, magnitude / _LARGEST, float("nan")).double().flatten(1)
    out = torch.cat([_product(integers, scales, part) for part in weight.parts], dim=1).to(x.dtype)
    return out if bias is None else out + bias.to(x.dtype)


def _product(inputs: Tensor, input_scales: Tensor, matrix: BlockMatrix) -> Tensor:
    """inputs [M, K], input_scales [M, K / 32] -> [M, N] float64."""
    integers, scales, offsets = decode(matrix)
    num_groups = scales.shape[1]
    grouped = inputs.unflatten(1, (num_groups, -1))
    sums = torch.einsum("mgk,ngk->mng", grouped, integers.double().unflatten(1, (num_groups, -1)))
    sums = sums * scales.double()
    if offsets is not None:
        sums = sums + grouped.sum(-1)[:, None] * offsets.double()
    by_scale = input_scales.repeat_interleave(num_groups // input_scales.shape[1], dim=1)
    product: Tensor = (sums * by_scale[:, None]).sum(-1)
    return product


def gather_rows_blocks(weight: BlockWeight, ids: Tensor) -> Tensor:
    """ids [T] of the outputs of a weight of one part -> their rows [T, K], in float32."""
    (matrix,) = weight.parts
    return dequantize(matrix.select_rows(ids))
