"""Plans that look ahead: tokens of an encoder see the whole text, or both sides of a window, on every backend."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quire.attention import ALL_POSITIONS, AttentionShape, StepArrays, make_planner
from quire.attention.gpu_items import Geometry
from quire.kernels import KVLayer, kernels_for
from quire.kernels.gpu_plan import ItemColumn
from quire.kernels.interface import AttentionParams

LENGTHS = (1, 16, 17, 300, 2, 1100, 63)
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 24, 16


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, radius: int) -> torch.Tensor:
    """Attention of one text in float64."""
    keys, values = (x.double().repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 1).transpose(0, 1) for x in (k, v))
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) * HEAD_DIM**-0.5
    if radius:
        places = torch.arange(len(q))
        scores = scores.masked_fill((places[:, None] - places).abs() > radius, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1)


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
@pytest.mark.parametrize("radius", [0, 3, 64])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_texts_see_both_sides(backend: str, radius: int, batch_invariant: bool) -> None:
    torch.manual_seed(radius)
    kernels, total = kernels_for(backend), sum(LENGTHS)
    counts = [-(-length // BLOCK) for length in LENGTHS]
    blocks = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
    tables = np.zeros((len(LENGTHS), max(counts)), dtype=np.int32)
    slots, first = [], 0
    for row, (length, count) in enumerate(zip(LENGTHS, counts, strict=True)):
        tables[row, :count] = blocks[first : first + count]
        places = np.arange(length)
        slots.append(tables[row, places // BLOCK] * BLOCK + places % BLOCK)
        first += count
    step = StepArrays(
        np.cumsum([0, *LENGTHS]).astype(np.int32),
        np.array(LENGTHS, dtype=np.int32),
        tables,
        np.concatenate(slots).astype(np.int32),
    )
    window = 2 * radius + 1 if radius else 0
    shape = AttentionShape(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        block_size=BLOCK,
        num_threads=2,
        window=window,
        lookahead=radius or ALL_POSITIONS,
        batch_invariant=batch_invariant,
    )
    plan = make_planner(backend, shape)(step)
    q, k, v = (torch.randn(total, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    shapes = kernels.kv_cache_shapes(sum(counts), NUM_KV_HEADS, BLOCK, HEAD_DIM)
    # What no text has written must not be read.
    layer = KVLayer(*(torch.full(shape, float("nan")) for shape in shapes))
    kernels.write_kv(k, v, layer, plan.slots)
    found = kernels.paged_attention(q, layer, plan, AttentionParams(HEAD_DIM**-0.5, window))
    for begin, end in zip(step.query_start_loc[:-1], step.query_start_loc[1:], strict=True):
        part = slice(int(begin), int(end))
        torch.testing.assert_close(found[part].double(), expected(q[part], k[part], v[part], radius), atol=2e-5, rtol=0)


def test_items_of_a_gpu_cover_the_same_keys() -> None:
    """Without its kernels: each item ends with the text, and begins where its window does."""
    step = StepArrays(
        np.array([0, 200], dtype=np.int32),
        np.array([200], dtype=np.int32),
        np.arange(8, dtype=np.int32)[None],
        np.arange(200, dtype=np.int32),
    )
    for lookahead, window in ((ALL_POSITIONS, 0), (10, 21)):
        buffers: Any = SimpleNamespace(tile=32, shape=SimpleNamespace(lookahead=lookahead))
        items = Geometry(step, window, buffers).tiles(np.array([0]), 16)
        begin, last = items[:, ItemColumn.TOKEN], items[:, ItemColumn.TOKEN] + items[:, ItemColumn.NUM_TOKENS] - 1
        assert (items[:, ItemColumn.KEY_END] == np.minimum(200, last + lookahead + 1)).all()
        earliest = np.maximum(0, begin - lookahead) if window else np.zeros_like(begin)
        assert (items[:, ItemColumn.KEY_BEGIN] == earliest // 32 * 32).all()
