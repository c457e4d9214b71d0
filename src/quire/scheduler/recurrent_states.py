"""RecurrentStates: which sequence owns which state slot, and at which positions snapshots are kept.

Snapshots are taken where another request is likely to go on: before the last block of a prompt, where a sequence ends
or is preempted (its slot is handed over), and at the last common prefix with another request. The last are found in two
ways. If the cache holds blocks of a prompt past the best snapshot, others begin like it, so one is taken at their end.
If a waiting request shares a prefix with one that is being computed, the latter saves its state there and the former
waits for it.

Only steps that are not in flight leave a state that is known: where a request ends while its step runs, its slot is
given back without a snapshot.
"""

from collections.abc import Sequence as SequenceOf

from quire.kv_cache.block_hash import BlockHash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import BlockTable
from quire.kv_cache.states import NO_STATE, ZERO_STATE, FoundState, StatePool
from quire.scheduler.sequence import NO_ROW, Sequence
from quire.step import StepPlan


class RecurrentStates:
    """Owned by the scheduler; exists only for models with recurrent layers."""

    def __init__(self, pool: StatePool, blocks: BlockPool) -> None:
        self.pool = pool
        self._caching = blocks.enable_prefix_caching
        self._block_size = blocks.block_size
        self._marks: dict[Sequence, set[int]] = {}
        """Positions at which the state of a prefilling sequence will be saved."""
        self._saves: list[tuple[Sequence, int, int]] = []
        """(sequence, position, slot): what the step in flight saves."""
        self._drafted: dict[Sequence, list[int]] = {}
        """Held slots: the n-th gets the state after the n-th token of the step in flight, whose next one is a draft."""
        self._in_flight = False

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, table: BlockTable, token_ids: SequenceOf[int], limit: int) -> FoundState | None:
        """The snapshot of the longest beginning of `token_ids`, of at most `limit` tokens."""
        return self.pool.find(table, token_ids, limit) if self._caching else None

    def await_common_prefix(
        self, sequence: Sequence, token_ids: SequenceOf[int], num_found: int, prefilling: SequenceOf[Sequence]
    ) -> tuple[int, BlockHash] | None:
        """If another sequence computes more of `token_ids` than the `num_found` tokens there is a snapshot for, let it
        save its state where they part. Returns (index, hash) of the last common block, which is worth waiting for."""
        size, longest, computing = self._block_size, num_found // self._block_size, None
        for other in prefilling:
            most = min((len(token_ids) - 1) // size, len(other.token_ids) // size)
            first = other.num_computed_tokens // size
            if most <= max(longest, first) or not _same_block(sequence, token_ids, other, max(longest, first)):
                continue
            low, high = max(longest, first) + 1, most  # they have `low` blocks in common, and at most `high`
            while low < high:
                middle = (low + high + 1) // 2
                if _same_block(sequence, token_ids, other, middle - 1):
                    low = middle
                else:
                    high = middle - 1
            longest, computing = low, other
        if computing is None:
            return None
        self._mark(computing, longest * size)
        return longest - 1, sequence.table.block_hash(longest - 1, token_ids)

    # -- slots --------------------------------------------------------------------------------------------------------

    def begin(self, sequence: Sequence, found: FoundState | None, num_known_tokens: int) -> None:
        """Give a sequence its slot, which begins as the snapshot found, if it is not loaded. The cache holds KV of its
        first `num_known_tokens` tokens, perhaps past that snapshot."""
        source: int | None = ZERO_STATE
        num_found = 0
        if found is not None:
            self.pool.stats.total_hits += 1
            source, num_found = found.slot if found.slot != NO_STATE else None, found.num_tokens
        if sequence.state == NO_STATE:
            sequence.state = self.pool.take(source)
        elif source is not None:
            self.pool.copy(source, sequence.state)
        size = self._block_size
        # The last token of a prompt is always computed, so a snapshot before it serves the same prompt, too.
        for position in ((sequence.group.num_prompt_tokens - 1) // size * size, num_known_tokens // size * size):
            if position > num_found and self._caching:
                self._mark(sequence, position)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """A fork: a sequence starts with a copy of another one's state."""
        child.state = self.pool.take(parent.state)

    def release(self, sequence: Sequence, *, is_loading: bool = False) -> None:
        """A sequence stops running. Its slot becomes a snapshot if its state is there and its position is known."""
        if sequence.state == NO_STATE:
            return
        slot, sequence.state = sequence.state, NO_STATE
        self._marks.pop(sequence, None)
        num_tokens = sequence.num_computed_tokens
        # A draft may have gone on past the token that ends the sequence.
        is_known = 0 < num_tokens <= len(sequence.token_ids) and not self._in_flight and not is_loading
        if is_known and self._caching:
            self.pool.keep(slot, sequence.table, sequence.token_ids, num_tokens)
        else:
            self.pool.give(slot)

    def forget(self, sequence: Sequence) -> None:
        """Remove the snapshots of what a sequence computed: they may hold the cause of its failure."""
        table, num_full = sequence.table, sequence.table.num_tokens // self._block_size
        self.pool.forget([table.prefix_hash(sequence.token_ids, n * self._block_size) for n in range(num_full + 1)])

    # -- a step -------------------------------------------------------------------------------------------------------

    def plan_saves(self, plan: StepPlan, index: int, sequence: Sequence, start: int, count: int) -> None:
        """Entry `index` of a plan computes `count` tokens of a sequence from `start` on: save its state at marks."""
        marks = self._marks.get(sequence)
        if marks is None:
            return
        for position in sorted(position for position in marks if start < position <= start + count):
            if self.pool.holds(sequence.table.prefix_hash(sequence.token_ids, position)):
                continue
            slot = self.pool.hold()
            if slot is not None:
                plan.state_saves.append((index, position - start, slot))
                self._saves.append((sequence, position, slot))
        marks = {position for position in marks if position > start + count}
        if marks:
            self._marks[sequence] = marks
        else:
            del self._marks[sequence]

    @property
    def num_for_drafts(self) -> int:
        """Draft tokens that the step may compute."""
        return self.pool.num_for_drafts

    def plan_draft(self, plan: StepPlan, index: int, sequence: Sequence, num_drafts: int) -> None:
        """Entry `index` of a plan computes draft tokens: save the state before each of them, since it may be wrong."""
        slots = self._drafted[sequence] = [slot for _ in range(num_drafts) if (slot := self.pool.hold()) is not None]
        assert len(slots) == num_drafts, "drafts are as many as `num_for_drafts` allows"
        plan.state_saves += [(index, count, slot) for count, slot in enumerate(slots, start=1)]

    def accept(self, sequence: Sequence, num_kept: int) -> None:
        """The first `num_kept` tokens of a sequence's draft step stay: it goes on with the state after them."""
        slots = self._drafted.pop(sequence)
        if num_kept <= len(slots):
            sequence.state = self.pool.exchange(sequence.state, slots.pop(num_kept - 1))
        self._drop(slots)

    def finish(self, plan: StepPlan, rows: SequenceOf[Sequence | None]) -> None:
        """Add the slots of its rows, and the copies before it, to a plan that computes, stores or loads something."""
        if plan.rows or plan.offload is not None:
            plan.state_copies = self.pool.take_copies()
        if plan.rows:
            plan.state_slots = [sequence.state for row in plan.rows if (sequence := rows[row]) is not None]
            self._in_flight = True

    def commit(self) -> None:
        """The step in flight has succeeded: what it saved can be found."""
        self._in_flight = False
        for sequence, position, slot in self._saves:
            if sequence.row == NO_ROW:
                self.pool.drop(slot)  # it was aborted, and its blocks have no hashes
            else:
                self.pool.keep_held(slot, sequence.table, sequence.token_ids, position)
        self._saves.clear()
        for sequence in [sequence for sequence in self._drafted if sequence.row == NO_ROW]:
            self._drop(self._drafted.pop(sequence))

    def roll_back(self) -> None:
        """The step in flight has failed, and all its sequences have stopped running."""
        self._in_flight = False
        self._drop([slot for _, _, slot in self._saves])
        self._saves.clear()
        for slots in self._drafted.values():
            self._drop(slots)
        self._drafted.clear()

    def _drop(self, slots: SequenceOf[int]) -> None:
        for slot in slots:
            self.pool.drop(slot)

    def _mark(self, sequence: Sequence, position: int) -> None:
        self._marks.setdefault(sequence, set()).add(position)


def _same_block(sequence: Sequence, token_ids: SequenceOf[int], other: Sequence, index: int) -> bool:
    """Whether two sequences have all tokens up to the end of a logical block in common."""
    return sequence.table.block_hash(index, token_ids) == other.table.block_hash(index, other.token_ids)
