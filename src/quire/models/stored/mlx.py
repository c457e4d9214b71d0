"""MLX: codes as a stream of bits along the inputs; a number is code * scale + bias of its group."""

from quire.kernels.coded import CodedMatrix
from quire.models.stored.bit_stream import num_words, unpack
from quire.models.stored.integers import code_bits
from quire.models.stored.tensors import INT32, SCALES, LayerTensors
from quire.quantization.levels import integers
from quire.quantization.stored import Scheme


def read_mlx(layer: LayerTensors, scheme: Scheme) -> CodedMatrix:
    (num_outputs, num_inputs), bits = layer.shape, scheme.bits
    group_size = scheme.group_of(num_inputs)
    groups = (num_outputs, layer.groups(group_size))
    codes = unpack(layer.take("weight", (num_outputs, num_words(bits, num_inputs)), INT32), bits, num_inputs)
    scales, shifts = (layer.finite(end, layer.take(end, groups, SCALES)) for end in ("scales", "biases"))
    return CodedMatrix(codes, scales, group_size, integers(code_bits(bits)), shifts=shifts)
