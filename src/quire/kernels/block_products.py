"""What dense layers of GGUF's blocks compute, in plain PyTorch: the specification of `csrc/gguf_linear.h`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.kernels.block_matrix import BlockMatrix, BlockWeight
from quire.kernels.blocks import dequantize
from quire.kernels.low_bit import quantize_rows

INPUTS_PER_SCALE = 32
"""Inputs of a row that share a scale when they are brought to 8 bits."""
STANDS_OUT = 4.0
"""A group of inputs stands out if its largest magnitude is more than so many times its row's root mean square."""
_SECOND_DIGIT = 254
"""A second digit counts in parts of the first one's unit: half a unit, the most that is left, is 127 of them."""


EXACT_INPUTS = frozenset({"Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS"})
"""Types of blocks whose inputs have both digits everywhere: those of more bits are stored to keep the model, and codes
with a sign cost as much with one digit. Beside the rounding of the others' weights one digit is lost."""


def keep_blocks(matrices: Sequence[BlockMatrix]) -> BlockWeight:
    """matrices [N_i, K], whose outputs lie side by side -> one weight with their bits."""
    return BlockWeight(tuple(matrices), needs_both_digits(matrices))


def needs_both_digits(matrices: Sequence[BlockMatrix]) -> bool:
    """Whether rows that meet these matrices have both digits in every group."""
    return any(matrix.type_name in EXACT_INPUTS for matrix in matrices)


def linear_blocks(x: Tensor, weight: BlockWeight, bias: Tensor | None) -> Tensor:
    """x [M, K], a weight of N outputs, bias [N] -> x weight^T + bias [M, N], with x in 8 bits by `rounded_groups`.

    Kernels sum products of integers exactly inside a group.
    """
    rows = rounded_groups(x, weight.both_digits)
    out = torch.cat([_product(rows, part) for part in weight.matrices()], dim=1).to(x.dtype)
    return out if bias is None else out + bias.to(x.dtype)


def rounded_groups(x: Tensor, both_digits: bool = False) -> Tensor:
    """x [M, K] -> the numbers [M, K] float64 that it is rounded to.

    Every 32 inputs become integers from -127 to 127 and a scale, by the rules of `quantize_rows`. A group that stands
    out has a second digit: what is left of each number in parts of 254 of the scale. `both_digits`: so has every group.
    """
    groups = x.double().unflatten(1, (-1, INPUTS_PER_SCALE))
    values, scales = quantize_rows(groups.flatten(0, 1))
    first, unit = values.double().view_as(groups), scales.double().view(len(x), -1, 1)
    left = torch.where(unit > 0, groups / unit - first, 0.0)
    second = (left * _SECOND_DIGIT).round() / _SECOND_DIGIT
    limit = STANDS_OUT * x.double().square().mean(1, keepdim=True).sqrt().unsqueeze(2)
    has_second = groups.abs().amax(2, keepdim=True) > (-1.0 if both_digits else limit)
    return ((first + torch.where(has_second, second, 0.0)) * unit).flatten(1)


def _product(rows: Tensor, matrix: BlockMatrix) -> Tensor:
    """rows [M, K] float64 -> [M, N] float64."""
    return rows @ dequantize(matrix).double().t()


def gather_rows_blocks(weight: BlockWeight, ids: Tensor) -> Tensor:
    """ids [T] of the outputs of a weight of one part -> their rows [T, K], in float32."""
    (matrix,) = weight.matrices()
    return dequantize(matrix.select_rows(ids))
