"""Dense layers with weights of 8 and 4 bits in plain PyTorch: what `quire.kernels.reference` says about them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.kernels.allocation import zeros
from quire.kernels.interface import Allocate, QuantizedWeight
from quire.quantization import ROTATED, WeightFormat

_SMALLEST_MAGNITUDE = 2.0**-100
"""A group of numbers below it is zeros: its scale could not be inverted."""
_RANGES = (14.1, 14.4, 14.7, 15.0, 15.3, 15.6, 15.9)
"""Steps into which `_fit_four_bits` divides the range of a group, which has room for 15."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> integers from -127 to 127 [M, K] int8, and the scale of each row [M].

    The largest magnitude of a row becomes 127; halves are rounded to even. A row without a magnitude of 2^-100 or more
    becomes zeros. The scale of a row with an infinity or a NaN is NaN, so that nothing computed from it looks valid.
    """
    magnitude = x.abs().amax(-1)
    finite = magnitude.isfinite()
    # A division of tensors: torch would compute number / tensor as a reciprocal and a product.
    inverse = torch.where(finite & (magnitude >= _SMALLEST_MAGNITUDE), torch.full_like(magnitude, 127) / magnitude, 0.0)
    values = (torch.where(finite[:, None], x, 0.0) * inverse[:, None]).round()
    return values.to(torch.int8), torch.where(finite, magnitude / 127, float("nan"))


def quantize_groups(x: Tensor, group_size: int, rotates: bool = False) -> tuple[Tensor, Tensor]:
    """x [M, K] -> integers [M, K] int8, and scales [M, groups]: each group of `group_size` inputs is a row of
    `quantize_rows`. `rotates`: groups are rotated before."""
    if rotates:
        x = rotate(x)
    groups = [quantize_rows(group) for group in x.split(group_size, dim=1)]
    return torch.cat([values for values, _ in groups], dim=1), torch.stack([scales for _, scales in groups], dim=1)


def rotate(x: Tensor) -> Tensor:
    """x [M, K] -> the same shape: each whole group of 64 times Hadamard's matrix / 8, which is its own inverse.

    Such a product spreads one large number over its group, so that it no longer sets the scale alone. Where the rows of
    a dense layer and its weights are both rotated, the layer's result is the same but for rounding.
    """
    whole = x.shape[1] // ROTATED * ROTATED
    groups, stride = x[:, :whole].reshape(-1, ROTATED) * 0.125, 1
    while stride < ROTATED:
        a, b = groups.view(-1, ROTATED // (2 * stride), 2, stride).unbind(2)
        groups = torch.stack((a + b, a - b), dim=2).view(-1, ROTATED)
        stride *= 2
    return torch.cat((groups.view(len(x), whole), x[:, whole:]), dim=1)


def quantize_linear(weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = zeros) -> QuantizedWeight:
    """weights [N_i, K] -> one weight of sum(N_i) outputs, in groups of inputs as `stored` says.

    With 8 bits a group is integers from -127 to 127 times a bfloat16 scale; its largest magnitude becomes about 127.
    With 4 bits it is integers from 0 to 15 times a scale, plus an offset. Both are whole multiples, at most 255, of
    units that an output has: the least powers of two that suffice. Halves are rounded to even. A group without a
    magnitude of 2^-100 or more becomes zeros.
    """
    weight = torch.cat([weight.float() for weight in weights])
    groups = (rotate(weight) if stored.rotates else weight).split(stored.group_size, dim=1)
    values, scales = (_eight_bits if stored.bits == 8 else _four_bits)(groups)
    return QuantizedWeight(values.to(torch.int8), scales, stored)


def _eight_bits(groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Groups [N, G] each -> integers [N, K] and scales [N, groups]."""
    magnitudes = torch.stack([group.abs().amax(1) for group in groups], dim=1)
    scales = torch.where(magnitudes >= _SMALLEST_MAGNITUDE, magnitudes / 127, 0.0).bfloat16().float()
    inverses = _inverse(scales).split(1, dim=1)
    values = [(group * inverse).round().clamp(-127, 127) for group, inverse in zip(groups, inverses, strict=True)]
    return torch.cat(values, dim=1), scales


def _four_bits(groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Groups [N, G] each -> integers [N, K], and offsets and scales as [N, groups, 2]."""
    fitted = torch.stack([_fit(group) for group in groups], dim=1)
    unit = _unit(fitted.abs().amax(1, keepdim=True)) * torch.tensor([-1.0, 1.0])
    counts = torch.where(unit != 0, fitted / unit, 0.0).round().clamp(max=255)
    counts[..., 1] = torch.where(fitted[..., 1] > 0, counts[..., 1].clamp(min=1), 0.0)
    scales = counts * unit
    values = [_integers(group, *scales[:, index].split(1, dim=1)) for index, group in enumerate(groups)]
    return torch.cat(values, dim=1), scales


def _unit(most: Tensor) -> Tensor:
    """The least power of two that is `most` / 255 or more; 0 for 0."""
    fraction, exponent = torch.frexp(most / 255)
    return torch.where(most > 0, torch.ldexp(torch.ones_like(most), exponent - (fraction == 0.5).int()), 0.0)


def _fit(group: Tensor) -> Tensor:
    """group [N, G] -> offsets and scales [N, 2] of the least error among a few candidates.

    The error is a sum of squares, each times the importance of its weight: its magnitude plus the root mean square of
    the group. The first candidate spans the group's range, zero included. For each of `_RANGES` the integers that such
    a range gives are taken, and the scale and offset with which they have the least error.
    """
    low, high = (bound[:, None] for bound in (group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)))
    kept = high - low >= _SMALLEST_MAGNITUDE
    span = torch.where(kept, high - low, 1.0)
    importance = group.abs() + group.square().mean(1, keepdim=True).sqrt()

    def error(offset: Tensor, scale: Tensor) -> Tensor:
        difference = _integers(group, offset, scale) * scale + offset - group
        return (importance * difference.square()).sum(1, keepdim=True)

    best_offset, best_scale = low, span / 15
    best_error = error(best_offset, best_scale)
    for steps in _RANGES:
        q = ((group - low) * (steps / span)).round().clamp(0, 15)
        w, sum_q, sum_qq, x, qx = (
            (importance * factor).sum(1, keepdim=True) for factor in (torch.ones_like(q), q, q * q, group, q * group)
        )
        determinant = w * sum_qq - sum_q * sum_q
        scale, offset = (w * qx - x * sum_q) / determinant, (sum_qq * x - sum_q * qx) / determinant
        found = error(offset, scale)
        better = (determinant > 0) & (scale >= _SMALLEST_MAGNITUDE) & (offset <= 0) & (found < best_error)
        best_offset, best_scale, best_error = (
            torch.where(better, new, old)
            for new, old in ((offset, best_offset), (scale, best_scale), (found, best_error))
        )
    return torch.where(kept, torch.cat((best_offset, best_scale), dim=1), 0.0)


def _integers(group: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    return ((group - offset) * _inverse(scale)).round().clamp(0, 15)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where there is no scale."""
    return torch.where(scale > 0, torch.ones_like(scale) / scale, 0.0)


def linear_quantized(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, num_outputs: int) -> Tensor:
    """x [M, K], a weight of N outputs, bias [N] -> x weight^T + bias [M, N], with x in 8 bits by `quantize_groups`.

    Products of integers are summed exactly within a group of inputs.
    """
    stored = weight.stored
    values, row_scales = quantize_groups(x, stored.group_size, stored.rotates)
    out = torch.zeros(len(x), num_outputs, dtype=x.dtype)
    groups = zip(values.split(stored.group_size, 1), weight.values.split(stored.group_size, 1), strict=True)
    for index, (inputs, group) in enumerate(groups):
        row_scale, scales = row_scales[:, index, None], weight.scales[:, index].to(x.dtype)
        scale = scales[:, 1] if stored.bits == 4 else scales
        # float64 holds every sum of products of bytes exactly.
        out += (inputs.double() @ group.double().T).to(x.dtype) * (scale * row_scale)
        if stored.bits == 4:
            out += scales[:, 0] * (row_scale * inputs.sum(1, keepdim=True))
    return out if bias is None else out + bias.to(x.dtype)


def gather_rows_quantized(weight: QuantizedWeight, ids: Tensor, num_inputs: int) -> Tensor:
    """A weight of `num_inputs` inputs, ids [T] of its outputs -> their rows [T, num_inputs] in float32: each value
    times its group's scale, plus its offset if it has one, and rotated back."""
    stored = weight.stored
    scales = weight.scales[ids].float().repeat_interleave(min(stored.group_size, num_inputs), dim=1)[:, :num_inputs]
    values = weight.values[ids].float()
    if stored.bits == 4:
        return values * scales[..., 1] + scales[..., 0]
    rows = values * scales
    return rotate(rows) if stored.rotates else rows
