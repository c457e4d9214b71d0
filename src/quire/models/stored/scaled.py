"""Numbers of 8 bits, one an element, and scales of tensors, outputs, groups or tiles: int8, float8, MXFP8."""

import torch
from torch import Tensor

from quire.kernels.coded import CodedMatrix
from quire.kernels.mxfp4 import powers_of_two
from quire.models.stored.tensors import FLOAT8, SCALES, LayerTensors
from quire.quantization.levels import E4M3, SIGNED_BYTES
from quire.quantization.stored import Scheme

_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "weight_shape", "weight_g_idx")
"""What describes activations of 8 bits: Quire computes these layers with activations in floats."""
_POWERS = 32
"""Inputs that share a power of two."""


def read_scaled_int(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    codes = layer.take("weight", layer.shape, ("I8",)).view(torch.uint8)
    scales, group_size = _scales(layer, scheme, "weight_scale")
    layer.skip(*_UNUSED)
    zeros = None
    if layer.has("weight_zero_point"):
        zeros = layer.take("weight_zero_point", layer.shape_of("weight_zero_point"), ("I8",))
        zeros = _spread(layer, "weight_zero_point", zeros, scheme)[0].to(scales.dtype)
        zeros = zeros if bool(zeros.any()) else None
    return CodedMatrix(codes, scales, group_size, SIGNED_BYTES, zeros=zeros)


def read_scaled_float(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    """Scales are factors, also where their name says that they are inverse."""
    codes = layer.take("weight", layer.shape, FLOAT8)
    layer.finite("weight", codes)
    name = "weight_scale_inv" if layer.has("weight_scale_inv") else "weight_scale"
    scales, group_size = _scales(layer, scheme, name)
    layer.skip(*_UNUSED)
    return CodedMatrix(codes.view(torch.uint8), scales, group_size, E4M3)


def read_mxfp8(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    codes = layer.take("weight", layer.shape, FLOAT8)
    layer.finite("weight", codes)
    exponents = layer.take("weight_scale", (layer.shape[0], layer.groups(_POWERS)), ("U8", "F8_E8M0")).view(torch.uint8)
    scales = layer.finite("weight_scale", powers_of_two(exponents)).bfloat16()
    layer.skip(*_UNUSED)
    return CodedMatrix(codes.view(torch.uint8), scales, _POWERS, E4M3)


def read_bnb_8bit(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    codes = layer.take("weight", layer.shape, ("I8",)).view(torch.uint8)
    largest = layer.finite("SCB", layer.take("SCB", (layer.shape[0],), SCALES))
    if layer.has("weight_format"):
        layout = layer.take("weight_format", (), ("U8",))
        if int(layout):
            raise layer.error("weight_format", f"is {int(layout)}; supported: 0, rows as they are")
    return CodedMatrix(codes, (largest.float() / 127)[:, None], layer.shape[1], SIGNED_BYTES)


def _scales(layer: LayerTensors, scheme: Scheme, name: str) -> tuple[Tensor, int]:
    """[N, G], and the inputs that share a scale."""
    stored = layer.take(name, layer.shape_of(name), SCALES)
    scales, group_size = _spread(layer, name, stored, scheme)
    return layer.finite(name, scales), group_size


def _spread(layer: LayerTensors, name: str, stored: Tensor, scheme: Scheme) -> tuple[Tensor, int]:
    """A number for the tensor, for each output, group or tile -> one for each output and group [N, G]."""
    num_outputs, num_inputs = layer.shape
    shape = tuple(stored.shape)
    if scheme.block is not None and stored.dim() == 2 and shape != (num_outputs, 1):
        rows, columns = scheme.block
        if shape == (-(-num_outputs // rows), -(-num_inputs // columns)):
            return stored.repeat_interleave(rows, dim=0)[:num_outputs], columns
    elif stored.numel() == 1:
        return stored.reshape(1, 1).expand(num_outputs, 1), num_inputs
    elif shape in ((num_outputs,), (num_outputs, 1)):
        return stored.reshape(num_outputs, 1), num_inputs
    elif scheme.group_size is not None and shape == (num_outputs, layer.groups(scheme.group_size)):
        return stored, scheme.group_size
    raise layer.error(
        name,
        f"has shape {list(shape)}; expected one number, one for each of {num_outputs} outputs, or one for each of the "
        f"groups or tiles that the config tells of a matrix {list(layer.shape)}",
    )
