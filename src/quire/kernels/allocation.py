"""Where packed weights get their memory, if the caller has none for them, and in which pieces they are packed."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def zeros(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """The usual `Allocate`."""
    return torch.zeros(shape, dtype=dtype)


def ignore(rows: Tensor) -> None:
    """What is done with packed rows, if the caller has no use for them."""


def row_pieces(weights: Sequence[Tensor], num_rows: int, num_bytes: int) -> Iterator[Tensor]:
    """The rows of each weight, a multiple of `num_rows` and at most `num_bytes` at a time where that is possible. A
    weight that must be copied before it is packed is one piece."""
    for weight in weights:
        panel_bytes = max(1, num_rows * weight.shape[1] * weight.element_size())
        if weight.is_contiguous():
            yield from weight.split(max(1, num_bytes // panel_bytes) * num_rows)
        else:
            yield weight
