"""GPTQ: `qweight` packed along the inputs, `qzeros` along the outputs, and `g_idx`, the group of each input."""

import torch
from torch import Tensor

from quire.kernels.coded import CodedMatrix
from quire.models.stored.bit_stream import num_words, unpack, unpack_columns
from quire.models.stored.integers import integer_matrix
from quire.models.stored.tensors import INT32, SCALES, LayerTensors
from quire.quantization.stored import Scheme


def read_gptq_v1(layer: LayerTensors, scheme: Scheme) -> CodedMatrix | Tensor:
    return _read(layer, scheme, zero_offset=1)


def read_gptq_v2(layer: LayerTensors, scheme: Scheme) -> CodedMatrix | Tensor:
    return _read(layer, scheme, zero_offset=0)


def _read(layer: LayerTensors, scheme: Scheme, zero_offset: int) -> CodedMatrix | Tensor:
    """Floats where groups of different sizes or codes would be needed to keep the bits."""
    (num_outputs, num_inputs), bits = layer.shape, scheme.bits
    group_size = scheme.group_of(num_inputs)
    num_groups = layer.groups(group_size)
    words = layer.take("qweight", (num_words(bits, num_inputs), num_outputs), INT32)
    packed_zeros = layer.take("qzeros", (num_groups, num_words(bits, num_outputs)), INT32)
    scales = layer.finite("scales", layer.take("scales", (num_groups, num_outputs), SCALES)).t()
    codes = unpack_columns(words, bits, num_inputs).t()
    # Version 1 stores zero points minus one, which wraps around inside a field.
    zeros = ((unpack(packed_zeros, bits, num_outputs).int() + zero_offset) % 2**bits).t()
    group_of = _group_of_inputs(layer, group_size, num_groups)
    if group_of is None:
        return integer_matrix(codes, scales, zeros, bits, group_size)
    order = group_of.argsort(stable=True)
    if torch.equal(group_of[order], torch.arange(num_inputs) // group_size):
        return integer_matrix(codes[:, order], scales, zeros, bits, group_size, order)
    weight: Tensor = (codes.float() - zeros.float()[:, group_of]) * scales.float()[:, group_of]
    return weight


def _group_of_inputs(layer: LayerTensors, group_size: int, num_groups: int) -> Tensor | None:
    """[K]; None where groups are runs of inputs."""
    if not layer.has("g_idx"):
        return None
    group_of = layer.take("g_idx", (layer.shape[1],), INT32).long()
    lowest, highest = int(group_of.min()), int(group_of.max())
    if lowest < 0 or highest >= num_groups:
        raise layer.error(
            "g_idx", f"has groups from {lowest} to {highest}; the {num_groups} groups are 0 to {num_groups - 1}"
        )
    in_order = torch.equal(group_of, torch.arange(layer.shape[1]) // group_size)
    return None if in_order else group_of
