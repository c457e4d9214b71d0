"""RequestQueues: all unfinished requests, waiting and running, and the sequence in each row.

Here a group gets its rows and gives back its memory. It waits, runs, may be preempted and wait again, and ends.
"""

import bisect
from collections.abc import Sequence as SequenceOf

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.decode_batch import DecodeBatch
from quire.scheduler.length_curve import Ending
from quire.scheduler.output_lengths import OutputLengths
from quire.scheduler.policies import AdmissionRule
from quire.scheduler.recurrent_states import RecurrentStates
from quire.scheduler.registered_prefixes import RegisteredPrefixes
from quire.scheduler.sequence import NO_ROW, Sequence, SequenceGroup
from quire.scheduler.waiting_queue import WaitingQueue


class RequestQueues:
    """Owned by the scheduler, whose parts read it and call its methods."""

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        waiting: WaitingQueue,
        lengths: OutputLengths,
        rules: SequenceOf[AdmissionRule],
        offload: BlockOffload | None,
        prefixes: RegisteredPrefixes,
        states: RecurrentStates | None = None,
    ) -> None:
        """`lengths` and `rules` are notified when groups start, are preempted or end."""
        self.by_id: dict[str, SequenceGroup] = {}
        self.num_background = 0
        """Requests of the background among them."""
        self.waiting = waiting
        self.running: list[SequenceGroup] = []
        """Groups with memory, sorted by `order`: the last one is preempted first."""
        self.decode_batch = DecodeBatch(pool)
        """Their sequences in steady decode."""
        self.not_in_decode_batch: list[SequenceGroup] = []
        """The groups of `running`, in its order, that have a sequence outside the decode batch. A group all of whose
        sequences are in it may be there, too."""
        self.rows: list[Sequence | None] = [None] * max_num_seqs
        self._rows_now: list[Sequence | None] | None = None
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._lengths = lengths
        self._rules = rules
        self._offload = offload
        self._prefixes = prefixes
        self.states = states
        """None without recurrent layers."""
        self.num_preemptions = 0
        """Since the start."""

    def enter(self, group: SequenceGroup) -> None:
        """Add a new request; it waits."""
        self.by_id[group.request.request_id] = group
        self.num_background += group.is_background
        self._lengths.enter(group)
        self.waiting.enter(group)

    @property
    def clients_wait(self) -> bool:
        """Whether a request that is not of the background has no first token."""
        return any(group.awaits_first_token for group in self.by_id.values())

    @property
    def num_background_rows(self) -> int:
        """Rows of running requests of the background."""
        num_rows = 0
        for group in reversed(self.running):
            if not group.is_background:
                break
            num_rows += group.num_rows
        return num_rows

    def start(self, group: SequenceGroup) -> None:
        """Run a group that was taken from `waiting`: it gets its rows."""
        for sequence in (*group.sequences, *group.idle_beams):
            sequence.row, sequence.was_reported = self.free_rows.pop(), False
            self.rows[sequence.row] = sequence
        bisect.insort(self.running, group, key=_order)
        bisect.insort(self.not_in_decode_batch, group, key=_order)
        self._rows_now = None
        self._lengths.start(group)

    def add_to_decode_batch(self, sequences: list[Sequence], num_in_flight: int) -> None:
        """Move the sequences that only decode from now on into the batch.

        `num_in_flight` steps are planned and not processed; each computes a token of every sequence that goes on.
        """
        joining = [
            sequence
            for sequence in sequences
            if not sequence.in_decode_batch
            and sequence.row != NO_ROW
            and sequence.group.only_decodes
            and sequence.num_missing_tokens == 1
            and sequence.table.has_room
            and sequence.table.num_tokens == len(sequence.token_ids) - 1 + num_in_flight
        ]
        if joining:
            self.decode_batch.add(joining, num_in_flight)
            self.not_in_decode_batch = [
                group
                for group in self.not_in_decode_batch
                if not all(sequence.in_decode_batch for sequence in group.sequences)
            ]

    def remove_from_decode_batch(self, sequence: Sequence) -> None:
        """The sequence is planned by itself from now on, if it goes on."""
        self.decode_batch.remove(sequence)
        group = sequence.group
        place = bisect.bisect_left(self.not_in_decode_batch, group.order, key=_order)
        if place == len(self.not_in_decode_batch) or self.not_in_decode_batch[place] is not group:
            self.not_in_decode_batch.insert(place, group)

    def dissolve_decode_batch(self) -> None:
        """Every sequence is planned by itself from now on."""
        if len(self.decode_batch):
            self.decode_batch.dissolve()
            self.not_in_decode_batch = self.running.copy()

    def rows_now(self) -> list[Sequence | None]:
        """A copy of `rows` that never changes."""
        if self._rows_now is None:
            self._rows_now = self.rows.copy()
        return self._rows_now

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a sequence without blocks continue as a fork of another."""
        child.table = parent.table.fork()
        child.advance(parent.num_computed_tokens)
        if self.states is not None:
            self.states.fork(parent, child)

    def discard(self, sequence: Sequence) -> None:
        """Free the blocks of a sequence whose tokens are not needed any more; it keeps its row."""
        sequence.discard_computed()
        if self.states is not None:
            self.states.release(sequence)
        sequence.table.free()

    def preempt(self, group: SequenceGroup) -> None:
        """Take all blocks and rows of a running group. It waits, at the place that its arrival gives it."""
        for sequence in (*group.sequences, *group.idle_beams):
            self._release(sequence)
            sequence.discard_computed()
        self._stop_running(group)
        group.awaited = None
        group.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(group)
        for rule in self._rules:
            rule.note_preemption()

    def drop(self, sequence: Sequence, ending: Ending = Ending.ABORTED) -> None:
        """End a sequence, and with its last sequence the group."""
        group = sequence.group
        self._lengths.end(sequence, ending)
        for rule in self._rules:
            rule.note_end()
        self._release(sequence)
        group.sequences.remove(sequence)
        if not group.sequences:
            for spare in group.idle_beams:
                self._release(spare)
            del self.by_id[group.request.request_id]
            self.num_background -= group.is_background
            self._prefixes.cancel(group.request.request_id)
            self.waiting.remove(group)
            self._stop_running(group)

    def drop_all(self, group: SequenceGroup) -> None:
        """End a whole group."""
        for sequence in tuple(group.sequences):
            self.drop(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give back a sequence's blocks and row."""
        if sequence.in_decode_batch:
            self.remove_from_decode_batch(sequence)
        if self.states is not None:
            is_loading = self._offload is not None and self._offload.is_loading(sequence)
            self.states.release(sequence, is_loading=is_loading)
        if self._offload is not None:
            self._offload.cancel(sequence)
        sequence.table.free(sequence.token_ids[: sequence.num_computed_tokens])
        sequence.drafts = None
        if sequence.row != NO_ROW:
            self.rows[sequence.row] = self._rows_now = None
            self.free_rows.append(sequence.row)
            sequence.row = NO_ROW

    def _stop_running(self, group: SequenceGroup) -> None:
        """Remove a group from the running ones, if it runs."""
        for groups in (self.running, self.not_in_decode_batch):
            place = bisect.bisect_left(groups, group.order, key=_order)
            if place < len(groups) and groups[place] is group:
                del groups[place]


def _order(group: SequenceGroup) -> tuple[int, int]:
    return group.order
