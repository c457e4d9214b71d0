"""The planner of `quire.kernels.sdpa`: sequences with equally many new tokens become runs, padded to one length."""

import numpy as np
import torch
from numpy.typing import NDArray

from quire.backends import GATHERED_SLOTS
from quire.kernels.sdpa import SdpaPlan, SequenceRun
from quire.kernels.transfer import to_device


def plan_attention(
    query_start_loc: NDArray[np.int32],
    seq_lens: NDArray[np.int32],
    block_tables: NDArray[np.int32],
    slots: NDArray[np.int32],
    *,
    device: torch.device,
    block_size: int,
    window: int = 0,
) -> SdpaPlan:
    """As `quire.attention.plan.plan_attention`, with all that is copied to the device copied here."""
    counts = np.diff(query_start_loc)
    num_blocks = -(-seq_lens // block_size)

    def on_device(array: NDArray[np.int32]) -> torch.Tensor:
        return to_device(array.astype(np.int32, copy=False), device)

    def make_run(members: NDArray[np.int64]) -> SequenceRun:
        count, most = int(counts[members[0]]), int(num_blocks[members].max())
        lengths = seq_lens[members, None]
        queries = lengths - count + np.arange(count)
        blocks = np.where(np.arange(most) < num_blocks[members, None], block_tables[members, :most], 0)
        positions = torch.arange(most * block_size, dtype=torch.int32, device=device)
        return SequenceRun(
            tokens=on_device(query_start_loc[members, None] + np.arange(count)).long(),
            blocks=on_device(blocks).long(),
            distance=positions - on_device(queries).unsqueeze(2),
            seq_lens=on_device(lengths).long(),
        )

    return SdpaPlan(
        query_start_loc=on_device(query_start_loc),
        seq_lens=on_device(seq_lens),
        block_tables=on_device(block_tables),
        slots=on_device(slots),
        window=window,
        runs=[make_run(members) for members in _split(counts, num_blocks, GATHERED_SLOTS // block_size)],
    )


def _split(counts: NDArray[np.int32], num_blocks: NDArray[np.int32], max_blocks: int) -> list[NDArray[np.int64]]:
    """Sequences of equal counts, the longest first, so that those that share a run are of similar length."""
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
