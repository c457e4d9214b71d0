"""DecodeBatch: the sequences in steady decode. Each gains one token in every step, and nothing else happens to it.

The numbers that a step needs of them are kept side by side, in one list per number. So a step costs the host one append
per sequence, plus the rare events: a full block, an end. Touching every sequence object instead would be slow: the
weights have just passed through the caches, so each object has to be fetched from memory again.

`Sequence.num_computed_tokens` of a member is derived from its tokens. Its block table and the fill of its last block
are brought up to date when that block is full, when the member leaves, and for reports (`update_fill`).
"""

from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from quire.kv_cache.block_pool import BlockPool
from quire.outputs import SampleId
from quire.scheduler.sequence import NO_ROW, Sequence
from quire.step import StepPlan

_T = TypeVar("_T")


@dataclass(slots=True)
class DecodeStep:
    """What the batch computes in one planned step, the first entries of its plan. The lists are never changed."""

    version: int
    """`DecodeBatch.version` when it was planned."""
    sequences: list[Sequence]
    positions: list[int]
    """Position of the token that each computes."""
    token_ids: list[list[int]]
    """The sequences' own lists."""
    stop_ids: list[frozenset[int]]
    samples: list[SampleId]
    last: frozenset[int]
    """Places whose sequence reaches its limit with the token of this step."""


class PlainSteps(NamedTuple):
    """Steps that do nothing but give each running sequence a token."""

    num_steps: int
    sequences: SequenceOf[Sequence] = ()
    num_context_tokens: int = 0
    """Tokens that the first of them reads, its own included; each further one reads a token more per sequence."""


class DecodeBatch:
    """Owned by `RequestQueues`. Every member lacks the KV of its last token only, and its last block is not shared.

    The lists below are replaced when the membership changes, never changed in place: steps in flight hold them.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.version = 0
        """Another number whenever a sequence joins or leaves."""
        self.sequences: list[Sequence] = []
        """In the order of the first entries of the plans."""
        self._pool = pool
        self._rows: list[int] = []
        self._token_ids: list[list[int]] = []
        """The sequences' own lists."""
        self._positions: list[int] = []
        """Position that each computes next, after the steps in flight."""
        self._ends: list[int] = []
        """Number of the step that gives each its last token, by its limit."""
        self._stop_ids: list[frozenset[int]] = []
        self._any_stop_ids: set[int] = set()
        """The union of `_stop_ids`; it may still hold ids of former members."""
        self._num_steps = 0
        """Number of the step planned last."""
        self._first_end = 0
        """The lowest of `_ends`."""
        self._samples: list[SampleId] = []
        self._samples_version = 0

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_blocks_needed(self) -> int:
        """Blocks that the next step takes."""
        size = self._pool.block_size
        return sum(1 for position in self._positions if not position % size) * self._pool.num_groups

    @property
    def num_blocks_needed_ahead(self) -> int | None:
        """Blocks that the step after those in flight takes; None if every member gets its last token from them."""
        size, step = self._pool.block_size, self._num_steps
        going_on = [position for position, end in zip(self._positions, self._ends, strict=True) if step < end]
        if not going_on:
            return None
        return sum(1 for position in going_on if not position % size) * self._pool.num_groups

    @property
    def plain_steps(self) -> "PlainSteps":
        """The steps from here in which no member takes a block, fills one or reaches its limit."""
        size, positions = self._pool.block_size, self._positions
        # The first token of a block takes it, and the last one fills it.
        to_block = min((-(position + 1) % size if position % size else 0 for position in positions), default=0)
        num_steps = max(0, min(to_block, self._first_end - 1 - self._num_steps))
        return PlainSteps(num_steps, self.sequences, sum(positions) + len(positions))

    # -- membership ---------------------------------------------------------------------------------------------------

    def add(self, sequences: list[Sequence], num_in_flight: int) -> None:
        """Add running sequences whose last block has room; each is part of all `num_in_flight` steps in flight."""
        self.version += 1
        ends = []
        for sequence in sequences:
            sequence.in_decode_batch = True
            self._any_stop_ids |= sequence.group.stop_ids
            ends.append(self._num_steps + sequence.group.max_num_tokens - len(sequence.token_ids) - num_in_flight)
        self.sequences = self.sequences + sequences
        self._rows = self._rows + [sequence.row for sequence in sequences]
        self._token_ids = self._token_ids + [sequence.token_ids for sequence in sequences]
        self._positions = self._positions + [sequence.table.num_tokens for sequence in sequences]
        self._ends = self._ends + ends
        self._first_end = min(self._ends)
        self._stop_ids = self._stop_ids + [sequence.group.stop_ids for sequence in sequences]

    def remove(self, sequence: Sequence) -> None:
        """Remove a member, at any time. A step in flight that computes it is still processed."""
        place = self._rows.index(sequence.row)
        sequence.table.catch_up(self._positions[place])
        sequence.leave_decode_batch()
        self.version += 1
        self.sequences = _without(self.sequences, place)
        self._rows = _without(self._rows, place)
        self._token_ids = _without(self._token_ids, place)
        self._positions = _without(self._positions, place)
        self._ends = _without(self._ends, place)
        self._first_end = min(self._ends, default=0)
        self._stop_ids = _without(self._stop_ids, place)
        if not self.sequences:
            self._any_stop_ids.clear()

    def dissolve(self) -> None:
        """Remove all members."""
        self.update_fill()
        for sequence in self.sequences:
            sequence.leave_decode_batch()
        self.version += 1
        self.sequences, self._rows, self._token_ids, self._positions = [], [], [], []
        self._ends, self._stop_ids, self._first_end = [], [], 0
        self._any_stop_ids.clear()

    def update_fill(self) -> None:
        """Bring the members' block tables and the fill of their last blocks up to date."""
        for sequence, position in zip(self.sequences, self._positions, strict=True):
            sequence.table.catch_up(position)

    # -- steps --------------------------------------------------------------------------------------------------------

    def plan(self, plan: StepPlan) -> DecodeStep:
        """Let each member compute its last token: the first entries of a plan. The pool has the blocks for it."""
        pool, size, positions = self._pool, self._pool.block_size, self._positions
        needy = [place for place, position in enumerate(positions) if not position % size]
        for place in needy:
            table = self.sequences[place].table
            table.catch_up(positions[place])
            changed = table.append(1, plan.block_copies)
            plan.new_blocks += table.entries(self._rows[place], changed)
        pool.count_filled((len(positions) - len(needy)) * pool.num_groups)
        plan.rows += self._rows
        plan.num_computed_tokens += positions
        plan.token_ids += [token_ids[-1] for token_ids in self._token_ids]
        self._positions = [position + 1 for position in positions]
        self._num_steps += 1
        if self._samples_version != self.version:
            self._samples_version, self._samples = self.version, [sequence.sample for sequence in self.sequences]
        last: frozenset[int] = frozenset()
        if self._first_end <= self._num_steps:
            last = frozenset(place for place, end in enumerate(self._ends) if end <= self._num_steps)
        return DecodeStep(self.version, self.sequences, positions, self._token_ids, self._stop_ids, self._samples, last)

    def repeat(self, num_steps: int, token_id: int) -> None:
        """Let each member gain `token_id` in each of so many plain steps, as if they were planned and processed."""
        self._pool.count_filled(num_steps * len(self._positions) * self._pool.num_groups)
        self._positions = [position + num_steps for position in self._positions]
        self._num_steps += num_steps
        for token_ids in self._token_ids:
            token_ids += [token_id] * num_steps

    def append_unknown_tokens(self) -> list[Sequence]:
        """Append to each member ~row, its token of the step in flight. Returns those for which it is the last."""
        for token_ids, row in zip(self._token_ids, self._rows, strict=True):
            token_ids.append(~row)
        step = self._num_steps
        if step < self._first_end:
            return []
        return [sequence for sequence, end in zip(self.sequences, self._ends, strict=True) if end <= step]

    def update(
        self, step: DecodeStep, token_ids: list[int], failed: Iterable[int], *, named_ahead: bool
    ) -> tuple[Collection[int], list[int]]:
        """Append the tokens sampled in a step to its sequences, and hash the blocks that it filled.

        `failed` are places without a token. `named_ahead`: each sequence already has ~row in place of its token.
        Returns the places left to the caller, whose sequence failed, ends or has left the batch, and the tokens of the
        others.
        """
        size = self._pool.block_size
        for place in [place for place, position in enumerate(step.positions) if not (position + 1) % size]:
            sequence = step.sequences[place]
            if sequence.row != NO_ROW:
                sequence.table.hash_full_blocks(sequence.token_ids, step.positions[place] + 1)
                sequence.table.give_back(step.positions[place] + 1)
        apart = {*failed, *step.last}
        if step.version != self.version:
            apart.update(place for place, sequence in enumerate(step.sequences) if not sequence.in_decode_batch)
        if not self._any_stop_ids.isdisjoint(token_ids):
            pairs = enumerate(zip(token_ids, step.stop_ids, strict=True))
            apart.update(place for place, (token_id, stop_ids) in pairs if token_id in stop_ids)
        own_lists = step.token_ids
        if apart:
            own_lists = [own for place, own in enumerate(own_lists) if place not in apart]
            token_ids = [token_id for place, token_id in enumerate(token_ids) if place not in apart]
        if named_ahead:
            for own, token_id in zip(own_lists, token_ids, strict=True):
                own[-1] = token_id
        else:
            for own, token_id in zip(own_lists, token_ids, strict=True):
                own.append(token_id)
        return sorted(apart), token_ids


def _without(values: list[_T], place: int) -> list[_T]:
    return values[:place] + values[place + 1 :]
