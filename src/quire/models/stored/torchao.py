"""torchao's tensors as transformers saves them: numbers of 8 bits, scales, and zero points where integers have them."""

import torch
from torch import Tensor

from quire.kernels.coded import CodedMatrix
from quire.models.stored.tensors import FLOAT8, SCALES, LayerTensors
from quire.quantization.levels import E4M3, SIGNED_BYTES
from quire.quantization.stored import Scheme

CODES = "_weight_qdata"
_SCALE, _ZERO_POINT = "_weight_scale", "_weight_zero_point"
_ACTIVATIONS = ("_weight_act_quant_scale", "_weight_act_quant_zero_point", "_weight_act_pre_scale")


def read_torchao(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    if layer.has(_ACTIVATIONS[-1]):
        raise layer.error(_ACTIVATIONS[-1], "multiplies activations (AWQ in torchao); supported: weights without it")
    layer.skip(*_ACTIVATIONS)
    is_float = layer.dtype_of(CODES) in FLOAT8
    codes = layer.take(CODES, layer.shape, FLOAT8 if is_float else ("I8",))
    stored = layer.finite(_SCALE, layer.take(_SCALE, layer.shape_of(_SCALE), SCALES))
    scales, group_size = _of_outputs(layer, _SCALE, stored)
    if is_float:
        layer.finite(CODES, codes)
        return CodedMatrix(codes.view(torch.uint8), scales, group_size, E4M3)
    zeros = None
    if layer.has(_ZERO_POINT):
        points = layer.take(_ZERO_POINT, tuple(stored.shape), ("I8",))
        zeros = _of_outputs(layer, _ZERO_POINT, points)[0].to(scales.dtype) if bool(points.any()) else None
    return CodedMatrix(codes.view(torch.uint8), scales, group_size, SIGNED_BYTES, zeros=zeros)


def _of_outputs(layer: LayerTensors, name: str, stored: Tensor) -> tuple[Tensor, int]:
    """A number for the tensor, for each output, or for each group of its inputs -> [N, G], and the inputs of a
    group."""
    (num_outputs, num_inputs), shape = layer.shape, tuple(stored.shape)
    if stored.numel() == 1:
        return stored.reshape(1, 1).expand(num_outputs, 1), num_inputs
    if len(shape) == 2 and shape[0] == num_outputs and shape[1] and num_inputs % shape[1] == 0:
        group_size = num_inputs // shape[1]
        if shape[1] == 1 or group_size % 8 == 0:
            return stored, group_size
    raise layer.error(
        name,
        f"has shape {list(shape)}; expected one number, or for each of {num_outputs} outputs one, or one for each "
        f"group of 8, 16, 24 … of its {num_inputs} inputs",
    )
