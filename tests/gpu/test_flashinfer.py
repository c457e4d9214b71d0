"""The FlashInfer backend with FlashInfer itself, where it is installed."""

import importlib.util

import pytest
import torch

from quire.attention import AttentionShape, StepArrays, make_planner
from tests.kernels.ragged_batch import Shape, ragged_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="FlashInfer is not installed"),
]
SHAPE = Shape(8, 2, 128, 64)


@pytest.mark.parametrize("sequences", [[(33, 1), (1, 1), (5000, 1)], [(70, 1), (150, 40), (9, 9), (130, 3)]])
@pytest.mark.parametrize("options", [{}, {"window": 37}, {"softcap": 2.0}])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_attention(sequences: list[tuple[int, int]], options: dict[str, float], kv_dtype: torch.dtype) -> None:
    from quire.kernels import flashinfer
    from tests.kernels.triton.test_attention import assert_close, caches_of, expected_of

    device = torch.device("cuda")
    batch = ragged_batch(sequences, SHAPE)
    caches, q = caches_of(batch, kv_dtype, device), batch.q.bfloat16()
    plan = make_planner(
        "flashinfer",
        AttentionShape(
            num_heads=SHAPE.num_heads, num_kv_heads=SHAPE.num_kv_heads, head_dim=SHAPE.head_dim,
            block_size=SHAPE.block_size, window=0, max_num_seqs=8, max_num_tokens=256, max_blocks=128, num_threads=1,
            kv_element_size=kv_dtype.itemsize, batch_invariant=False, device=device,
        ),
    )  # fmt: skip
    of_cpu = batch.plan
    arrays = [x.numpy() for x in (of_cpu.query_start_loc, of_cpu.seq_lens, of_cpu.block_tables, of_cpu.slots)]
    found = flashinfer.paged_attention(q.to(device), *caches, plan(StepArrays(*arrays)), batch.scale, **options)
    assert_close(found, expected_of(batch, q, caches, **options), torch.bfloat16)
