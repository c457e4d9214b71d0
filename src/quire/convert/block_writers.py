"""BLOCK_WRITERS: floats to the blocks of GGUF, with the bits of ggml's own conversion.

The types that need no search: k-quants are written by llama.cpp's quantiser, which reads the files written here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quire.gguf.block_types import BLOCK_TYPES_BY_NAME

Write = Callable[[Tensor], Tensor]
"""[N, K] float32 → the bytes of N rows [N, bytes of a row] uint8."""


def _as_type(dtype: torch.dtype) -> Write:
    return lambda rows: rows.to(dtype).contiguous().view(torch.uint8).view(len(rows), -1)


def _in_blocks(name: str, write: Write) -> Write:
    """`write` [n, numbers of a block] → [n, bytes of a block], for whole rows."""
    size = BLOCK_TYPES_BY_NAME[name].num_values
    return lambda rows: write(rows.float().reshape(-1, size)).view(len(rows), -1)


def _half(numbers: Tensor) -> Tensor:
    """[n, 1] → [n, 2]: the bytes of float16."""
    return numbers.half().contiguous().view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, torch.ones_like(scale) / scale)


def _largest(blocks: Tensor) -> Tensor:
    """[n, 1]: the number of the largest magnitude, with its sign."""
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True))


def _nibbles(integers: Tensor) -> Tensor:
    """[n, 32] → [n, 16]: the first half in the low halves of bytes."""
    low, high = (integers & 15).chunk(2, dim=1)
    return low | high << 4


def _fifth_bits(integers: Tensor) -> Tensor:
    """[n, 32] → [n, 4]: bit j of the word is the fifth bit of element j."""
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    bits = ((integers >> 4) & 1).view(-1, 4, 8)
    return (bits * weights).sum(-1).to(torch.uint8)


def _q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(1, keepdim=True) / 127
    exact = blocks * _inverse(scale)
    integers = (exact.abs() + 0.5).floor() * exact.sign()  # halves away from zero
    return torch.cat((_half(scale), integers.to(torch.int8).view(torch.uint8)), dim=1)


def _symmetric(blocks: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """Scales, and integers from 0 to 2 zero - 1; the largest magnitude becomes -zero."""
    scale = _largest(blocks) / -zero
    integers = (blocks * _inverse(scale) + (zero + 0.5)).trunc().clamp(0, 2 * zero - 1)
    return scale, integers.to(torch.uint8)


def _shifted(blocks: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, least numbers, and integers from 0 to `most`."""
    least = blocks.amin(1, keepdim=True)
    scale = (blocks.amax(1, keepdim=True) - least) / most
    integers = ((blocks - least) * _inverse(scale) + 0.5).trunc().clamp(0, most)
    return scale, least, integers.to(torch.uint8)


def _q4_0(blocks: Tensor) -> Tensor:
    scale, integers = _symmetric(blocks, 8)
    return torch.cat((_half(scale), _nibbles(integers)), dim=1)


def _q4_1(blocks: Tensor) -> Tensor:
    scale, least, integers = _shifted(blocks, 15)
    return torch.cat((_half(scale), _half(least), _nibbles(integers)), dim=1)


def _q5_0(blocks: Tensor) -> Tensor:
    scale, integers = _symmetric(blocks, 16)
    return torch.cat((_half(scale), _fifth_bits(integers), _nibbles(integers)), dim=1)


def _q5_1(blocks: Tensor) -> Tensor:
    scale, least, integers = _shifted(blocks, 31)
    return torch.cat((_half(scale), _half(least), _fifth_bits(integers), _nibbles(integers)), dim=1)


BLOCK_WRITERS: dict[str, Write] = {
    "F32": _as_type(torch.float32),
    "F16": _as_type(torch.float16),
    "BF16": _as_type(torch.bfloat16),
    **{
        name: _in_blocks(name, write)
        for name, write in {"Q8_0": _q8_0, "Q5_1": _q5_1, "Q5_0": _q5_0, "Q4_1": _q4_1, "Q4_0": _q4_0}.items()
    },
}
