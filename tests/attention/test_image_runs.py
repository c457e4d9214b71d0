"""Plans of steps with images whose tokens see each other, against attention in float64 by the mask's definition."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from quire.attention import AttentionShape, GroupPlanner, StepArrays
from quire.attention.image_runs import split_at_images
from quire.kernels import KVLayer, kernels_for
from quire.kernels.interface import AttentionParams

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK, IMAGE = 4, 2, 16, 16, 40
SEQUENCES = [(90, 90, [20]), (700, 200, [505, 590]), (64, 1, []), (300, 31, [260]), (45, 45, [5]), (600, 77, [560])]
"""(tokens, new tokens, where images begin); of the fourth a part of the image was computed before."""


def shape_of(window: int, *, batch_invariant: bool = False) -> AttentionShape:
    return AttentionShape(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        block_size=BLOCK,
        num_threads=2,
        window=window,
        batch_invariant=batch_invariant,
        image_tokens=IMAGE,
    )


def make_step() -> tuple[StepArrays, list[tuple[int, int]]]:
    """The step, and its runs: the new tokens of images."""
    width = max(-(-length // BLOCK) for length, _, _ in SEQUENCES)
    shuffled = np.random.default_rng(0).permutation(len(SEQUENCES) * width)
    tables = shuffled.astype(np.int32).reshape(len(SEQUENCES), width)
    starts = np.cumsum([0, *(new for _, new, _ in SEQUENCES)]).astype(np.int32)
    slots, runs = [], []
    for row, (length, new, images) in enumerate(SEQUENCES):
        places = np.arange(length - new, length)
        slots.append(tables[row, places // BLOCK] * BLOCK + places % BLOCK)
        for image in images:
            begin = max(image, length - new)
            runs.append((int(starts[row]) + begin - (length - new), image + IMAGE - begin))
    lengths = np.array([length for length, _, _ in SEQUENCES], dtype=np.int32)
    return StepArrays(starts, lengths, tables, np.concatenate(slots).astype(np.int32)), runs


def expected(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, images: Sequence[int], window: int
) -> torch.Tensor:
    """Attention of the last tokens of a sequence: causal, or in the same image; and in the window."""
    place, key = torch.arange(len(keys))[-len(q) :, None], torch.arange(len(keys))
    seen = key <= place
    for image in images:
        seen = seen | ((place >= image) & (place < image + IMAGE) & (key >= image) & (key < image + IMAGE))
    if window:
        seen &= key > place - window
    keys, values = (x.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 1).transpose(0, 1) for x in (keys, values))
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) * HEAD_DIM**-0.5
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1)


@pytest.mark.parametrize("window", [0, 40, 41, 64, 80, 500])
@pytest.mark.parametrize(("backend", "batch_invariant"), [("cpu", False), ("cpu", True), ("sdpa", False)])
def test_tokens_of_an_image_see_each_other(backend: str, batch_invariant: bool, window: int) -> None:
    torch.manual_seed(window)
    kernels, (step, runs) = kernels_for(backend), make_step()
    planner = GroupPlanner(backend, [shape_of(window, batch_invariant=batch_invariant)])
    (plan,) = planner([step], images=runs)
    num_blocks = step.block_tables.size
    shapes = kernels.kv_cache_shapes(num_blocks, NUM_KV_HEADS, BLOCK, HEAD_DIM)
    # What no sequence has written must not be read.
    layer = KVLayer(*(torch.full(shape, float("nan")) for shape in shapes))
    texts = [[torch.randn(length, NUM_KV_HEADS, HEAD_DIM) for _ in "kv"] for length, _, _ in SEQUENCES]
    for row, text in enumerate(texts):
        places = np.arange(len(text[0]))
        slots = step.block_tables[row, places // BLOCK] * BLOCK + places % BLOCK
        kernels.write_kv(text[0], text[1], layer, torch.from_numpy(slots.astype(np.int32)))
    q = torch.randn(len(step.slots), NUM_HEADS, HEAD_DIM)
    found = kernels.paged_attention(q, layer, plan, AttentionParams(HEAD_DIM**-0.5, window))
    for row, (_, _, images) in enumerate(SEQUENCES):
        part = slice(int(step.query_start_loc[row]), int(step.query_start_loc[row + 1]))
        keys, values = (x.double() for x in texts[row])
        torch.testing.assert_close(
            found[part].double(), expected(q[part], keys, values, images, window), atol=2e-5, rtol=0
        )


def test_a_step_without_images_is_not_split() -> None:
    step, _ = make_step()
    (plan,) = GroupPlanner("cpu", [shape_of(64)])([step])
    assert len(plan.seq_lens) == len(SEQUENCES)


@pytest.mark.parametrize(("window", "most"), [(0, IMAGE), (41, 1), (64, 24)])
def test_every_token_is_in_one_sequence(window: int, most: int) -> None:
    step, runs = make_step()
    split = split_at_images(step, runs, shape_of(window))
    assert split.query_start_loc[0] == 0
    assert split.query_start_loc[-1] == len(step.slots)
    counts = np.diff(split.query_start_loc)
    assert (counts > 0).all()
    assert split.lookaheads is not None
    assert counts[split.lookaheads > 0].max() <= most
    assert (split.key_ends >= split.seq_lens).all()
