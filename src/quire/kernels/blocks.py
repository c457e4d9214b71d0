"""The blocks of GGUF in plain PyTorch: the numbers that their bits stand for.

Every type is whole numbers with a scale for each group of 16 or 32 of them, and for some types an offset:
number = integer * scale + offset.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quire.gguf.block_types import BLOCK_TYPES_BY_NAME
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.mxfp4 import MAGNITUDES, powers_of_two


class Decoded(NamedTuple):
    """n blocks of V numbers in G groups."""

    integers: Tensor
    """[n, V] int8"""
    scales: Tensor
    """[n, G] float32"""
    offsets: Tensor | None = None
    """[n, G] float32; None: all 0"""


def dequantize(matrix: BlockMatrix) -> Tensor:
    """[N, K] float32, with the bits of llama.cpp's own conversion."""
    integers, scales, offsets = decode(matrix)
    size = integers.shape[-1] // scales.shape[-1]
    numbers = integers.float().unflatten(-1, (-1, size)) * scales.unsqueeze(-1)
    if offsets is not None:
        numbers += offsets.unsqueeze(-1)
    flat: Tensor = numbers.flatten(-2)
    return flat


def decode(matrix: BlockMatrix) -> Decoded:
    """The whole rows: integers [N, K], scales and offsets [N, K / size of a group]."""
    block = BLOCK_TYPES_BY_NAME[matrix.type_name]
    found = _DECODERS[matrix.type_name](matrix.rows.reshape(-1, block.num_bytes))
    num_rows = len(matrix.rows)
    return Decoded(*(None if part is None else part.reshape(num_rows, -1) for part in found))  # type: ignore[arg-type]


def _half(blocks: Tensor, at: int) -> Tensor:
    """[n, 1]: the float16 at a byte."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[n, 16] bytes -> [n, 32]: the low halves, then the high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """[n, 32]: the bits of the 32-bit word at a byte, times 16."""
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    fifth: Tensor = ((blocks[:, at : at + 4, None] >> bits) & 1).flatten(1) << 4
    return fifth


def _q4_0(blocks: Tensor) -> Decoded:
    return Decoded(_nibbles(blocks[:, 2:]).char() - 8, _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Decoded:
    return Decoded(_nibbles(blocks[:, 4:]).char(), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Decoded:
    return Decoded((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).char() - 16, _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Decoded:
    integers = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return Decoded(integers.char(), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Decoded:
    return Decoded(blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _shifted(packed: Tensor, width: int, shifts: tuple[int, ...]) -> Tensor:
    """[n, bytes], taken in runs of `width` bytes -> for each run its 2-bit numbers at every shift, one after another:
    [n, runs * shifts * width]."""
    runs = packed.unflatten(-1, (-1, 1, width))
    by_shift = torch.tensor(shifts, dtype=torch.uint8, device=packed.device).view(-1, 1)
    shifted: Tensor = ((runs >> by_shift) & 3).flatten(1)
    return shifted


def _q2_k(blocks: Tensor) -> Decoded:
    integers = _shifted(blocks[:, 16:80], 32, (0, 2, 4, 6))
    scales, least = (blocks[:, :16] & 15).float(), (blocks[:, :16] >> 4).float()
    return Decoded(integers.char(), _half(blocks, 80) * scales, -(_half(blocks, 82) * least))


def _q3_k(blocks: Tensor) -> Decoded:
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(-1, 1)
    high = ((blocks[:, None, :32] >> bits) & 1).flatten(1)
    integers = _shifted(blocks[:, 32:96], 32, (0, 2, 4, 6)) | (high << 2)
    packed = blocks[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), dim=-1)
    upper = _shifted(packed[:, 8:], 4, (0, 2, 4, 6))
    return Decoded(integers.char() - 4, _half(blocks, 108) * ((low | (upper << 4)).float() - 32))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K -> 8 scales and 8 offsets, [n, 8] each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), dim=-1)
    offsets = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), dim=-1)
    return scales.float(), offsets.float()


def _q4_k(blocks: Tensor) -> Decoded:
    scales, least = _six_bits(blocks[:, 4:16])
    integers = _nibbles(blocks[:, 16:].unflatten(-1, (4, 32))).flatten(1)
    return Decoded(integers.char(), _half(blocks, 0) * scales, -(_half(blocks, 2) * least))


def _q5_k(blocks: Tensor) -> Decoded:
    scales, least = _six_bits(blocks[:, 4:16])
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(-1, 1)
    high = ((blocks[:, None, 16:48] >> bits) & 1).flatten(1) << 4
    integers = _nibbles(blocks[:, 48:].unflatten(-1, (4, 32))).flatten(1) | high
    return Decoded(integers.char(), _half(blocks, 0) * scales, -(_half(blocks, 2) * least))


def _q6_k(blocks: Tensor) -> Decoded:
    low = _nibbles(blocks[:, :128].unflatten(-1, (2, 64))).flatten(1)
    high = _shifted(blocks[:, 128:192], 32, (0, 2, 4, 6))
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return Decoded((low | high << 4).char() - 32, _half(blocks, 208) * scales)


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _by_table(codes: Tensor, table: tuple[int, ...]) -> Tensor:
    return torch.tensor(table, dtype=torch.int8, device=codes.device)[codes.int()]


def _iq4_nl(blocks: Tensor) -> Decoded:
    return Decoded(_by_table(_nibbles(blocks[:, 2:]), _IQ4), _half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Decoded:
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=-1).flatten(1)
    high = torch.stack([(blocks[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    integers = _by_table(_nibbles(blocks[:, 8:].unflatten(-1, (8, 16))).flatten(1), _IQ4)
    return Decoded(integers, _half(blocks, 0) * ((low | high << 4).float() - 32))


def _mxfp4(blocks: Tensor) -> Decoded:
    doubled = (*MAGNITUDES, *(-each for each in MAGNITUDES))
    return Decoded(_by_table(_nibbles(blocks[:, 1:]), doubled), powers_of_two(blocks[:, :1]) * 0.5)


_DECODERS: dict[str, Callable[[Tensor], Decoded]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
