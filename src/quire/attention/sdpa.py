"""The planner of `quire.kernels.sdpa`: sequences with equally many new tokens become runs, padded to one length."""

import numpy as np
import torch
from numpy.typing import NDArray

from quire.attention.inputs import AttentionShape, StepArrays
from quire.backends import GATHERED_SLOTS
from quire.kernels.sdpa import SdpaPlan, SequenceRun
from quire.kernels.transfer import to_device


def plan_attention(step: StepArrays, shape: AttentionShape) -> SdpaPlan:
    """Plan one step and copy the plan to the device."""
    query_start_loc, seq_lens, block_tables, slots, lookaheads = step
    block_size, device = shape.block_size, shape.device
    counts = np.diff(query_start_loc)
    # With a window, only the blocks that a new token sees: the others may be somebody else's by now.
    seen_from = np.maximum(0, seq_lens - counts + shape.lookahead - shape.window + 1) // block_size * (shape.window > 0)
    key_ends = step.key_ends
    num_blocks = -(-key_ends // block_size) - seen_from

    def on_device(array: NDArray[np.int32]) -> torch.Tensor:
        return to_device(array.astype(np.int32, copy=False), device)

    def make_run(members: NDArray[np.int64]) -> SequenceRun:
        count, most = int(counts[members[0]]), int(num_blocks[members].max())
        first = seen_from[members, None]
        lengths, ends = (array[members, None] - first * block_size for array in (seq_lens, key_ends))
        queries = lengths - count + np.arange(count) + shape.lookahead  # the last position that each sees
        places = np.minimum(first + np.arange(most), block_tables.shape[1] - 1)
        blocks = np.where(np.arange(most) < num_blocks[members, None], block_tables[members[:, None], places], 0)
        positions = torch.arange(most * block_size, dtype=torch.int32, device=device)
        distance = positions - on_device(queries).unsqueeze(2)
        if lookaheads is not None:  # nothing up to its end is hidden from a run, except by a window
            in_run = on_device(lookaheads[members, None]).unsqueeze(2) > 0
            distance = torch.where(in_run, distance.clamp(max=0), distance)
        if shape.lookahead or lookaheads is not None:  # no later position hides what lies behind the end
            distance = distance.masked_fill(positions >= on_device(ends).unsqueeze(2), 1)
        return SequenceRun(
            tokens=on_device(query_start_loc[members, None] + np.arange(count)).long(),
            blocks=on_device(blocks).long(),
            distance=distance,
            seq_lens=on_device(ends).long(),
        )

    return SdpaPlan(
        query_start_loc=on_device(query_start_loc),
        seq_lens=on_device(seq_lens),
        block_tables=on_device(block_tables),
        slots=on_device(slots),
        window=shape.window,
        runs=[make_run(members) for members in _split(counts, num_blocks, GATHERED_SLOTS // block_size)],
    )


def _split(counts: NDArray[np.int32], num_blocks: NDArray[np.int32], max_blocks: int) -> list[NDArray[np.int64]]:
    """Groups of sequences with equal counts and similar lengths; a group gathers at most `max_blocks` blocks."""
    order = np.lexsort((-num_blocks, counts))
    runs: list[NDArray[np.int64]] = []
    first = 0
    for place in range(1, len(order) + 1):
        padded = (place + 1 - first) * num_blocks[order[first]]
        if place == len(order) or counts[order[place]] != counts[order[first]] or padded > max_blocks:
            if counts[order[first]]:
                runs.append(order[first:place])
            first = place
    return runs
