"""compressed-tensors' `weight_packed`: integers of 2 to 8 bits as a stream of bits, and floats of 4 bits in pairs."""

import torch

from quire.kernels.coded import CodedMatrix
from quire.kernels.mxfp4 import powers_of_two
from quire.models.stored.bit_stream import nibbles, num_words, unpack, unpack_columns
from quire.models.stored.integers import integer_matrix
from quire.models.stored.tensors import FLOAT8, INT32, SCALES, LayerTensors
from quire.quantization.levels import E2M1
from quire.quantization.stored import Scheme

_UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_NVFP4_GROUP, _MXFP4_GROUP = 16, 32


def read_packed_int32(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    (num_outputs, num_inputs), bits = layer.shape, scheme.bits
    group_size = scheme.group_of(num_inputs)
    num_groups = layer.groups(group_size)
    shape = layer.take("weight_shape", (2,), ("I64", "I32")).tolist()
    if shape != list(layer.shape):
        raise layer.error("weight_shape", f"is {shape}, expected {list(layer.shape)} by config.json")
    codes = unpack(layer.take("weight_packed", (num_outputs, num_words(bits, num_inputs)), INT32), bits, num_inputs)
    whole = layer.shape_of("weight_scale") in ((1,), ())
    stored = layer.take("weight_scale", layer.shape_of("weight_scale") if whole else (num_outputs, num_groups), SCALES)
    scales = layer.finite("weight_scale", stored.reshape(1, 1).expand(num_outputs, 1) if whole else stored)
    zeros = torch.full(scales.shape, 2 ** (bits - 1))
    if layer.has("weight_zero_point"):
        packed = layer.take("weight_zero_point", (num_words(bits, num_outputs), num_groups), INT32)
        zeros = unpack_columns(packed, bits, num_outputs)
    layer.skip(*_UNUSED)
    order = None
    if layer.has("weight_g_idx"):
        group_of = layer.take("weight_g_idx", (num_inputs,), ("I32", "I64")).long()
        order = group_of.argsort(stable=True)
        if not torch.equal(group_of[order], torch.arange(num_inputs) // group_size):
            raise layer.error(
                "weight_g_idx", f"does not give {group_size} inputs to each of {num_groups} groups; fetch it again"
            )
        codes = codes[:, order]
    return integer_matrix(codes, scales, zeros, bits, group_size, order)


def read_nvfp4(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    """A scale is a float8, divided by the tensor's own number."""
    codes = _pairs(layer)
    stored = layer.take("weight_scale", (layer.shape[0], layer.groups(_NVFP4_GROUP)), FLOAT8).float()
    whole = layer.take("weight_global_scale", layer.shape_of("weight_global_scale"), ("F32",))
    if whole.numel() != 1 or not 0 < float(whole) < float("inf"):
        raise layer.error("weight_global_scale", f"is {whole.flatten()[:4].tolist()}; expected one positive number")
    scales = layer.finite("weight_scale", stored / whole.reshape(()))
    layer.skip(*_UNUSED)
    return CodedMatrix(codes, scales, _NVFP4_GROUP, E2M1)


def read_mxfp4(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    """A scale is a power of two."""
    codes = _pairs(layer)
    shape = (layer.shape[0], layer.groups(_MXFP4_GROUP))
    exponents = layer.take("weight_scale", shape, ("U8", "F8_E8M0")).view(torch.uint8)
    layer.skip(*_UNUSED)
    return CodedMatrix(codes, layer.finite("weight_scale", powers_of_two(exponents)).bfloat16(), _MXFP4_GROUP, E2M1)


def _pairs(layer: LayerTensors) -> torch.Tensor:
    num_outputs, num_inputs = layer.shape
    if num_inputs % 2:
        raise layer.error("weight_packed", f"holds pairs of inputs, and the layer has {num_inputs} by config.json")
    return nibbles(layer.take("weight_packed", (num_outputs, num_inputs // 2), ("U8",)))
