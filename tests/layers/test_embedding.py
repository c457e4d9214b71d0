"""Rows are fresh float32 tensors; rows of a tied table are the values that the head multiplies by."""

import pytest
import torch

from quire.kernels import kernels_for, reference
from quire.layers.embedding import Embedding, TiedEmbedding
from quire.layers.linear import LinearWeight, output_head


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


@pytest.mark.parametrize("kernels", [reference, kernels_for("cpu")], ids=["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_rows_of_a_head(kernels: object, dtype: str) -> None:
    table, ids = torch.randn(50, 64), torch.tensor([49, 0, 49, 33], dtype=torch.int32)
    head = output_head(kernels, LinearWeight(table), dtype)  # type: ignore[arg-type]  # a module satisfies the protocol
    embedding = TiedEmbedding(head)
    table.fill_(float("nan"))  # nothing of the argument is kept
    rows = embedding(ids)
    assert rows.dtype == torch.float32
    # Unit vectors bring the weight back, exactly: a row of one value has a scale of 1 / 127.
    weight = head(torch.eye(64)).T
    torch.testing.assert_close(rows, weight[ids.long()], rtol=0, atol=1e-6)
    rows += 1
    torch.testing.assert_close(embedding(ids), rows - 1)
