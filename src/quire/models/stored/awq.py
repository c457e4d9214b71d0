"""AWQ: gemm packs outputs, eight to a word in an order of its own; gemv packs inputs in theirs."""

import torch
from torch import Tensor

from quire.kernels.coded import CodedMatrix
from quire.models.stored.bit_stream import unpack
from quire.models.stored.integers import integer_matrix
from quire.models.stored.tensors import INT32, SCALES, LayerTensors
from quire.quantization.stored import Scheme

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a word of gemm holds each of its eight outputs."""
_MIDDLE = 8
"""The zero point where a checkpoint has none."""


def read_awq_gemm(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    num_outputs, num_inputs = layer.shape
    group_size = scheme.group_of(num_inputs)
    num_groups = layer.groups(group_size)
    width = _words(layer, num_outputs)
    codes = _outputs(layer.take("qweight", (num_inputs, width), INT32))
    scales = layer.finite("scales", layer.take("scales", (num_groups, num_outputs), SCALES)).t()
    zeros = torch.full_like(scales, _MIDDLE)
    if layer.has("qzeros") or not scheme.symmetric:
        zeros = _outputs(layer.take("qzeros", (num_groups, width), INT32)).t()
    return integer_matrix(codes.t(), scales, zeros, 4, group_size)


def read_awq_gemv(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    num_outputs, num_inputs = layer.shape
    group_size = scheme.group_of(num_inputs)
    num_groups = layer.groups(group_size)
    codes = unpack(layer.take("qweight", (num_outputs, _words(layer, num_inputs)), INT32), 4, num_inputs)
    # Groups are padded to whole words of zero points, and further by some versions.
    shape = layer.shape_of("qzeros")
    width = max(shape[1] if len(shape) == 2 else 0, -(-num_groups // 8))
    zeros = unpack(layer.take("qzeros", (num_outputs, width), INT32), 4, num_groups)
    scales = layer.finite("scales", layer.take("scales", (num_outputs, 8 * width), SCALES)[:, :num_groups])
    return integer_matrix(codes, scales, zeros, 4, group_size)


def _words(layer: LayerTensors, count: int) -> int:
    if count % 8:
        raise layer.error("qweight", f"of shape {list(layer.shape)} by config.json is not packed in words of 8")
    return count // 8


def _outputs(words: Tensor) -> Tensor:
    """words [R, W] -> codes [R, 8 W] of outputs in their order."""
    codes = unpack(words, 4, words.shape[1] * 8)
    return codes.view(len(words), -1, 8)[..., _ORDER].flatten(1)
