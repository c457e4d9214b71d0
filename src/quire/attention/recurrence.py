"""plan_recurrence: one step of the recurrent layers, laid out once for all of them.

Sequences of one token are computed together in one step. So is each token of a sequence that saves its state after
every token but the last: a draft is computed as its tokens would be one by one, to the same bits. Longer sequences are
cut into chunks: at most `CHUNK` tokens, and a chunk ends wherever the state is saved. The r-th chunks of all sequences
make a round.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.inputs import Int32Array
from quire.kernels.recurrent_plan import ChunkRound, Chunks, ConvRows, RecurrentPlan, StepRound
from quire.kernels.transfer import to_device
from quire.layer_spec import RECURRENT_CHUNK

CHUNK = RECURRENT_CHUNK
"""Most tokens of a chunk."""

Save = tuple[int, int, int]
"""(sequence, number of its new tokens, slot)."""
SaveSlots = Mapping[tuple[int, int], int]
"""(sequence, number of its new tokens) → slot."""


def plan_recurrence(
    query_start_loc: Int32Array,
    slots: Sequence[int],
    saves: Sequence[Save] = (),
    *,
    conv_width: int,
    device: torch.device | None = None,
) -> RecurrentPlan:
    """The plan of B sequences, whose states are in `slots`. A save never goes to the slot of a running sequence."""
    device = device or torch.device("cpu")

    def send(values: object) -> Tensor:
        return to_device(np.asarray(values, dtype=np.int64), device)

    starts, counts = query_start_loc[:-1].astype(np.int64), np.diff(query_start_loc).astype(np.int64)
    save_slots = {(sequence, count): slot for sequence, count, slot in saves}
    num_saves = Counter(sequence for sequence, _ in save_slots)
    is_step = np.array([num_saves[place] == count - 1 for place, count in enumerate(counts)], dtype=bool)
    steps = np.flatnonzero(is_step)
    longer = np.flatnonzero(~is_step)
    return RecurrentPlan(
        query_start_loc=send(query_start_loc),
        slots=send(slots),
        saves=send(saves).view(-1, 3),
        conv=_conv_rows(query_start_loc, saves, conv_width, device),
        steps=_step_rounds(steps, starts, counts, slots, save_slots, device),
        chunks=_chunks(longer.tolist(), starts, counts, slots, save_slots, device) if len(longer) else None,
    )


def _step_rounds(
    sequences: NDArray[np.int64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    slots: Sequence[int],
    save_slots: SaveSlots,
    device: torch.device,
) -> list[StepRound]:
    rounds: list[StepRound] = []
    while len(sequences):
        offset = len(rounds)
        saved = [(i, save_slots[s, offset + 1]) for i, s in enumerate(sequences) if (s, offset + 1) in save_slots]
        parts = (
            starts[sequences] + offset,
            [slots[sequence] for sequence in sequences],
            [index for index, _ in saved],
            [slot for _, slot in saved],
        )
        rounds.append(StepRound(*(to_device(np.array(part, dtype=np.int64), device) for part in parts)))
        sequences = sequences[counts[sequences] > len(rounds)]
    return rounds


def _conv_rows(query_start_loc: Int32Array, saves: Sequence[Save], width: int, device: torch.device) -> ConvRows:
    older, num_sequences = width - 1, len(query_start_loc) - 1
    bounds = query_start_loc.astype(np.int64) + np.arange(num_sequences + 1) * older
    """The row at which the older inputs of each sequence begin; a last entry is the end."""
    tokens = np.repeat(np.arange(1, num_sequences + 1) * older, np.diff(query_start_loc))
    saved = np.array([bounds[sequence] + count for sequence, count, _ in saves], dtype=np.int64)

    def runs(first: NDArray[np.int64]) -> Tensor:
        return to_device(np.ascontiguousarray((first[:, None] + np.arange(older)).ravel()), device)

    return ConvRows(
        tokens=to_device(np.arange(query_start_loc[-1], dtype=np.int64) + tokens, device),
        before=runs(bounds[:-1]),
        after=runs(bounds[1:] - older),
        saved=runs(saved),
    )


def _chunks(
    sequences: Iterable[int],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    slots: Sequence[int],
    save_slots: SaveSlots,
    device: torch.device,
) -> Chunks:
    rounds: list[list[tuple[int, int, int]]] = []
    """For each round (sequence, first of its new tokens, end)."""
    for sequence in sequences:
        total = int(counts[sequence])
        cuts = sorted({count for other, count in save_slots if other == sequence} | {total})
        start, number = 0, 0
        for cut in cuts:
            while start < cut:
                end = min(start + CHUNK, cut)
                if number == len(rounds):
                    rounds.append([])
                rounds[number].append((sequence, start, end))
                start, number = end, number + 1
    pieces = [piece for group in rounds for piece in group]
    lengths = np.array([end - start for _, start, end in pieces], dtype=np.int64)
    first = np.array([starts[sequence] + start for sequence, start, _ in pieces], dtype=np.int64)
    places = np.arange(lengths.max())
    padding = places >= lengths[:, None]
    rows = np.where(padding, 0, first[:, None] + places)

    def send(values: Sequence[int]) -> Tensor:
        return to_device(np.array(values, dtype=np.int64), device)

    made, begin = list[ChunkRound](), 0
    for group in rounds:
        saved = [(index, save_slots[s, end]) for index, (s, _, end) in enumerate(group) if (s, end) in save_slots]
        made.append(
            ChunkRound(
                first=begin,
                end=begin + len(group),
                slots=send([slots[sequence] for sequence, _, _ in group]),
                saved=send([index for index, _ in saved]),
                save_slots=send([slot for _, slot in saved]),
            )
        )
        begin += len(group)
    return Chunks(
        rows=to_device(rows, device),
        padding=to_device(padding, device),
        tokens=to_device(rows[~padding], device),
        places=to_device(np.flatnonzero(~padding), device),
        rounds=made,
    )
