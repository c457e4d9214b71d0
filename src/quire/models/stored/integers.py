"""integer_matrix: codes that are integers, with zero points, as a `CodedMatrix`."""

from torch import Tensor

from quire.kernels.coded import CodedMatrix
from quire.quantization.levels import integers


def code_bits(bits: int) -> int:
    """Bits that a code of few bits takes once it is packed: kernels have codes of 4 and of 8."""
    return 4 if bits <= 4 else 8


def integer_matrix(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, order: Tensor | None = None
) -> CodedMatrix:
    """codes [N, K] uint8 of `bits` bits, scales [N, G], zeros [N, G] of any integer type. Zero points that are all the
    same become part of the numbers that codes stand for."""
    width, first = code_bits(bits), int(zeros.flatten()[0])
    if bool((zeros == first).all()):
        return CodedMatrix(codes, scales, group_size, integers(width, first), order=order)
    return CodedMatrix(codes, scales, group_size, integers(width), zeros=zeros.to(scales.dtype), order=order)
