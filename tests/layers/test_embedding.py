"""Rows come out in float32 and are the caller's to change."""

import pytest
import torch

from quire.layers.embedding import Embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rows(dtype: torch.dtype, index: torch.dtype) -> None:
    table = torch.randn(10, 4).to(dtype)
    embedding = Embedding(table)
    rows = embedding(torch.tensor([3, 3, 9], dtype=index))
    assert rows.dtype == torch.float32
    assert torch.equal(rows, table[[3, 3, 9]].float())
    rows += 1
    assert torch.equal(embedding(torch.tensor([3], dtype=index)), table[[3]].float())
    assert embedding(torch.empty(0, dtype=index)).shape == (0, 4)
