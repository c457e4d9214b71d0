"""The cpu backend with torch's own product where a step of an encoder has many rows of float32.

From some hundred rows on the library behind torch is faster than the kernels that serve decoding: 7 % at 512 rows and
15 % at 1,024 (AVX2), with the order of the weights undone each time. Its rounding depends on the number of rows, which
a decoder must not show.
"""

from typing import Any

import torch
from torch import Tensor

from quire.kernels import cpu

MIN_ROWS = 384
"""Fewer rows are not worth the copy of the weight."""


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    if x.shape[0] < MIN_ROWS or packed.dtype != torch.float32:
        return cpu.linear(x, packed, bias, num_outputs)
    num_inputs = x.shape[1]
    weight = packed[:, :num_inputs].transpose(0, 1).reshape(num_inputs, -1)[:, :num_outputs]
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def __getattr__(name: str) -> Any:
    """Every other operation is the cpu backend's."""
    return getattr(cpu, name)
