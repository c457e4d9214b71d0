"""DecodeBatch: running sequences that gain one token in every step, and of which a step has nothing else to say.

Of such a sequence only its tokens grow; its counts grow by one a step, as everybody's, so they are kept here side by
side and the sequence's own are brought up to date (`settle`) where its block is full, where it leaves, or where
somebody wants to see them. What a step costs the host is then one append a sequence, and the events: when the weights
have just passed through the caches, every object that is touched has to come from memory again.
"""

from quire.kv_cache.block_pool import BlockPool
from quire.outputs import SampleId
from quire.scheduler.sequence import Sequence
from quire.step import StepPlan


class DecodeBatch:
    """Owned by `RequestQueues`. A sequence that is in it lacks one token, and has room for that in its last block or needs a
    new one."""

    def __init__(self, pool: BlockPool) -> None:
        self.sequences: list[Sequence] = []
        """In the order of the first entries of the plans."""
        self.num_planned = 0
        """How many of them the step in flight computes: all or, between two steps, none."""
        self._pool = pool
        self._rows: list[int] = []
        self._token_ids: list[list[int]] = []
        """The sequences' own lists."""
        self._starts: list[int] = []
        """Positions computed next, past the step in flight."""
        self._ends: list[int] = []
        """The step in which each gets its last token, by its limit."""
        self._stop_ids: list[frozenset[int]] = []
        self._any_stop_ids: set[int] = set()
        """All of them, and those of some that have left."""
        self._step = 0
        self._first_end = 0
        """No sequence reaches its limit before this step."""
        self._samples: list[SampleId] | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def samples(self) -> list[SampleId]:
        """What the sequences are called outside: the same list while they are the same, not to be changed."""
        if self._samples is None:
            self._samples = [sequence.sample for sequence in self.sequences]
        return self._samples

    @property
    def num_blocks_needed(self) -> int:
        """Blocks that the next step takes."""
        size = self._pool.block_size
        return sum(1 for start in self._starts if not start % size)

    def join(self, sequence: Sequence) -> None:
        """Take in a running sequence between two steps, whose last block has room."""
        group, num_tokens = sequence.group, len(sequence.token_ids)
        end = self._step + group.max_num_tokens - num_tokens
        self._first_end = min(self._first_end, end) if self.sequences else end
        sequence.in_decode_batch = True
        self.sequences.append(sequence)
        self._rows.append(sequence.row)
        self._token_ids.append(sequence.token_ids)
        self._starts.append(sequence.num_computed_tokens)
        self._ends.append(end)
        self._stop_ids.append(group.stop_ids)
        self._any_stop_ids |= group.stop_ids
        self._samples = None

    def leave(self, sequence: Sequence) -> None:
        """Let a sequence go, between two steps, with its counts as they are."""
        place = self._rows.index(sequence.row)
        self._settle(place)
        sequence.in_decode_batch = False
        for column in (self.sequences, self._rows, self._token_ids, self._starts, self._ends, self._stop_ids):
            del column[place]
        self._samples = None

    def disband(self) -> None:
        """Let all go, at any time. Those of a step in flight are still to hear of its result."""
        self.settle()
        for sequence in self.sequences:
            sequence.in_decode_batch = False
        for column in (self.sequences, self._rows, self._token_ids, self._starts, self._ends, self._stop_ids):
            column.clear()
        self._any_stop_ids.clear()
        self._samples = None
        self.num_planned = 0

    def settle(self) -> None:
        """Bring every sequence's own counts up to date."""
        for place in range(len(self.sequences)):
            self._settle(place)

    def plan(self, plan: StepPlan) -> None:
        """Let each compute its last token: the first entries of a plan. The pool has the blocks for it."""
        pool, size = self._pool, self._pool.block_size
        needy = [place for place, start in enumerate(self._starts) if not start % size]
        for place in needy:
            table = self.sequences[place].table
            changed = table.append(1, plan.block_copies)
            plan.new_blocks.append((self._rows[place], changed, table.blocks[changed:]))
        pool.num_filled_slots += len(self._starts) - len(needy)
        plan.rows += self._rows
        plan.num_computed_tokens += self._starts
        plan.token_ids += [token_ids[-1] for token_ids in self._token_ids]
        self._starts = [start + 1 for start in self._starts]
        self._step += 1
        self.num_planned = len(self.sequences)

    def take_in(self, token_ids: list[int]) -> tuple[list[tuple[Sequence, int]], list[int]]:
        """The step in flight has computed, and drew one token for each; none failed.

        Blocks that are full get their names. Returns the sequences that end with their token, which have left and lack
        it, and the tokens of the others.
        """
        self.num_planned = 0
        size = self._pool.block_size
        for place, start in enumerate(self._starts):
            if not start % size:
                sequence = self.sequences[place]
                self._settle(place)
                sequence.table.hash_full_blocks(sequence.token_ids, start)
        ending: list[tuple[Sequence, int]] = []
        if self._step >= self._first_end or not self._any_stop_ids.isdisjoint(token_ids):
            ending = [
                (sequence, token_id)
                for sequence, token_id, end, stop_ids in zip(
                    self.sequences, token_ids, self._ends, self._stop_ids, strict=True
                )
                if self._step >= end or token_id in stop_ids
            ]
        if ending:
            rows = {sequence.row for sequence, _ in ending}
            token_ids = [token_id for row, token_id in zip(self._rows, token_ids, strict=True) if row not in rows]
            for sequence, _ in ending:
                self.leave(sequence)
            self._first_end = min(self._ends, default=0)
        for own, token_id in zip(self._token_ids, token_ids, strict=True):
            own.append(token_id)
        return ending, token_ids

    def _settle(self, place: int) -> None:
        sequence, start = self.sequences[place], self._starts[place]
        sequence.num_computed_tokens = start - bool(self.num_planned)
        sequence.table.catch_up(start)
