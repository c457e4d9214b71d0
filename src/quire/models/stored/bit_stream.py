"""Codes packed as one stream of bits, the first code in the lowest bits."""

import torch
from torch import Tensor
from torch.nn import functional

_CODES = 8
"""Codes that begin and end together with whole bytes, whatever their width."""


def num_words(bits: int, count: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """words [R, W] of 32 bits or bytes -> the first `count` codes of each row [R, count] uint8."""
    stream = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    num_runs = -(-count // _CODES)
    stream = functional.pad(stream, (0, max(0, num_runs * bits - stream.shape[1])))[:, : num_runs * bits]
    runs = stream.reshape(len(stream), num_runs, bits).to(torch.int16)
    codes = torch.empty(len(stream), num_runs, _CODES, dtype=torch.uint8)
    for index in range(_CODES):
        byte, shift = divmod(index * bits, 8)
        code = runs[..., byte] >> shift
        if shift + bits > 8:
            code = code | runs[..., byte + 1] << (8 - shift)
        codes[..., index] = (code & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(1)[:, :count]


def unpack_columns(words: Tensor, bits: int, count: int) -> Tensor:
    """words [W, C], packed along the first dimension -> codes [count, C] uint8."""
    return unpack(words.t(), bits, count).t()


def nibbles(packed: Tensor) -> Tensor:
    """packed [..., B] uint8 -> codes [..., 2 B] uint8, that of the low half first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
