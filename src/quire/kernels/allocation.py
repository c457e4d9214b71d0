"""Where packed weights get their memory, if the caller has none for them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def zeros(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """The usual `Allocate`."""
    return torch.zeros(shape, dtype=dtype)
