"""ResultProcessor: what a step's result makes of the sequences that were in it.

Their computed tokens advance, samples are appended, full blocks named; the prompt's samples and a search's beams fork;
what has ended leaves. Nothing is decided here but whether a sequence has ended.
"""

from collections.abc import Sequence as SequenceOf
from itertools import islice

from quire.kv_cache.block_pool import BlockPool
from quire.outputs import EngineStats, RequestCounts, SampleId, SequenceDelta, StepDeltas
from quire.request import FinishReason, Request
from quire.scheduler.beam_search import BeamSearch
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.length_curve import Ending
from quire.scheduler.prefix_lookup import PrefixLookup
from quire.scheduler.registered_prefixes import RegisteredPrefixes
from quire.scheduler.sequence import NO_ROW, Sequence, SequenceGroup
from quire.scheduler.service import OUTPUT_TOKEN
from quire.step import BeamCandidates, RowFork, StepPlan, StepResult, TokenLogprobs

_ENDINGS: dict[str, Ending] = {FinishReason.STOP: Ending.NATURAL, FinishReason.LENGTH: Ending.LIMIT}

ForkedTable = tuple[int, int, list[int]]
"""A table that forked, as in `StepPlan.new_blocks`."""


class ResultProcessor:
    """Owned by the scheduler."""

    def __init__(
        self,
        pool: BlockPool,
        groups: RequestQueues,
        lookup: PrefixLookup,
        transfers: BlockOffload | None,
        prefixes: RegisteredPrefixes,
        stats: EngineStats,
    ) -> None:
        self._pool = pool
        self._queues = groups
        self._counts_service = groups.waiting.counts_service
        self._lookup = lookup
        self._transfers = transfers
        self._prefixes = prefixes
        self._stats = stats
        self._forked: list[ForkedTable] = []
        self._row_forks: list[RowFork] = []

    def take_forks(self) -> tuple[list[ForkedTable], list[RowFork]]:
        """Tables that forked, and beams that went on, since the last call: for the next plan."""
        forked, row_forks = self._forked, self._row_forks
        self._forked, self._row_forks = [], []
        return forked, row_forks

    def take_in(
        self,
        plan: StepPlan,
        result: StepResult,
        rows: SequenceOf[Sequence | None],
        counts: SequenceOf[int],
        *,
        may_join: bool,
    ) -> StepDeltas:
        """Advance every sequence of the plan; returns what each sample gained.

        `rows` says who had which row when it was planned, `counts` how many of each row's computed tokens stay. A
        sequence that left meanwhile is passed over. `may_join`: who has decoded may go on in decode_batch.
        """
        block_size = self._pool.block_size
        deltas = StepDeltas()
        num_in_decode_batch = self._queues.decode_batch.num_planned
        if any(result.errors[:num_in_decode_batch]):
            self._queues.disband()
            num_in_decode_batch = 0
        samples, token_ids = self._update_decode_batch(deltas, result.token_ids[:num_in_decode_batch])
        for row, start, count in islice(zip(plan.rows, plan.num_computed_tokens, counts, strict=True), num_in_decode_batch, None):
            sequence = rows[row]
            if sequence is None or sequence.row == NO_ROW:
                continue
            end = start + count
            sequence.num_computed_tokens = end
            if end % block_size < count:  # a block was filled
                sequence.table.hash_full_blocks(sequence.token_ids, end)
            group = sequence.group
            if start < group.num_prompt_tokens:
                self._stats.total_prompt_tokens += min(end, group.num_prompt_tokens) - start
                if len(group.sequences) > 1 and end >= group.num_prompt_tokens and sequence is group.leader:
                    self._share_prompt(group)
        for index, entries in result.prompt_logprobs.items():
            sequence = rows[plan.rows[index]]
            if sequence is not None and sequence.row != NO_ROW:
                delta = self._prompt_delta(sequence, entries)
                if delta is not None:
                    deltas.others.append(delta)
        place, sample_rows = num_in_decode_batch, plan.sample_rows
        complete, following = set(result.terminated), result.extra_token_ids
        while place < len(sample_rows):
            sequence = rows[sample_rows[place]]
            if sequence is None or sequence.row == NO_ROW:
                place += 1
                continue
            group, first = sequence.group, place
            if group.beam_search is None:
                place += 1
                if sequence.token_ids[-1] < 0:
                    sequence.token_ids.pop()  # the token was named before it was known
                drawn = [result.token_ids[first]]
                if following:
                    drawn += following.get(first, ())
                own, error = result.logprobs[first], result.errors[first]
                logprobs = None if own is None else [own, *result.extra_logprobs.get(first, ())]
                self._extend(deltas, sequence, drawn, logprobs, error, complete=first in complete)
                if may_join:
                    self._queues.join(sequence)
            else:
                place += len(group.sequences)  # its beams stand side by side
                error = next((error for error in result.errors[first:place] if error is not None), None)
                if error is not None:
                    deltas.others += self._fail(group, error)
                else:
                    deltas.others += self._advance(
                        group, group.beam_search, [result.candidates[i] for i in range(first, place)]
                    )
        if token_ids:
            deltas.samples = [*samples, *deltas.samples] if deltas.samples else samples
            deltas.token_ids = token_ids + deltas.token_ids
        self._stats.total_steps += bool(plan.rows)
        return deltas

    def _update_decode_batch(self, deltas: StepDeltas, token_ids: list[int]) -> tuple[list[SampleId], list[int]]:
        """Advance the sequences that go in decode_batch, which drew `token_ids`; those that end say so in `deltas`.

        Returns the others and their tokens.
        """
        decode_batch, waiting = self._queues.decode_batch, self._queues.waiting
        if not token_ids:
            return [], []
        ending, token_ids = decode_batch.take_in(token_ids)
        for sequence, token_id in ending:
            self._extend(deltas, sequence, [token_id], None, None)
        self._stats.total_generated_tokens += len(token_ids)
        if self._counts_service:
            for sequence in decode_batch.sequences:
                waiting.serve(sequence.group.request.tenant, OUTPUT_TOKEN)
        return decode_batch.samples, token_ids

    def _share_prompt(self, group: SequenceGroup) -> None:
        """The leader has the prompt's KV: the others share it, but for those that more is found of (`_resume`)."""
        forked = [group.leader]
        for sequence in group.sequences[1:]:
            if sequence.num_computed_tokens:
                continue  # it started with another leader
            if sequence.num_output_tokens and self._lookup.find_output(sequence, forked) != ([], []):
                continue
            sequence.table = group.leader.table.fork()
            sequence.num_computed_tokens = sequence.table.num_tokens
            self._forked.append((sequence.row, 0, sequence.table.blocks.copy()))
            forked.append(sequence)

    def _prompt_delta(self, leader: Sequence, entries: list[TokenLogprobs]) -> SequenceDelta | None:
        """The prompt log-probabilities that this step added; those computed again after a preemption are dropped."""
        group = leader.group
        end = min(leader.num_computed_tokens, group.num_prompt_tokens - 1)
        fresh = end - group.num_prompt_logprobs
        if fresh <= 0:
            return None
        group.num_prompt_logprobs = end
        delta = _delta(group, leader.index)
        delta.prompt_logprobs = entries[-fresh:]
        return delta

    def _extend(
        self,
        deltas: StepDeltas,
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None,
        error: str | None,
        *,
        complete: bool = False,
    ) -> None:
        """Append a sample and what follows it, up to where the sequence ends, and say so in `deltas`."""
        group, tokens, ends = sequence.group, sequence.token_ids, False
        for place, token_id in enumerate(token_ids if error is None else (), start=1):
            tokens.append(token_id)
            if token_id in group.stop_ids or len(tokens) >= group.max_num_tokens:
                ends, complete = True, complete and place == len(token_ids)
                del token_ids[place:]
                break
        if error is None:
            self._stats.total_generated_tokens += len(token_ids)
            if self._counts_service:
                self._queues.waiting.serve(group.request.tenant, OUTPUT_TOKEN * len(token_ids))
            if sequence.was_reported and not ends and not complete and logprobs is None and len(token_ids) == 1:
                deltas.samples.append(sequence.sample)
                deltas.token_ids += token_ids
                return
        delta = _delta(group, sequence.index)
        deltas.others.append(delta)
        sequence.was_reported = True
        if error is not None:
            delta.error, delta.finish_reason = error, FinishReason.ERROR
            self._distrust(sequence)
        else:
            delta.token_ids = token_ids
            if logprobs is not None:
                delta.logprobs = logprobs[: len(token_ids)]
            if ends or complete:
                _finish(delta, group.request, complete=complete)
                self._prefixes.complete(group.request.request_id, sequence.table)
        if delta.finish_reason is not None:
            self._queues.drop(sequence, _ENDINGS.get(delta.finish_reason, Ending.ABORTED))

    def _advance(
        self, group: SequenceGroup, search: BeamSearch, candidates: SequenceOf[BeamCandidates]
    ) -> list[SequenceDelta]:
        """One step of a beam search: survivors fork from their parents, the others' blocks are free (paper, 4.4)."""
        survivors = search.advance(candidates)
        if search.done:
            return self._conclude(group, search)
        parents, chosen = group.sequences, {survivor.parent for survivor in survivors}
        for place, parent in enumerate(parents):
            if place not in chosen:
                parent.table.free()
                parent.num_computed_tokens, parent.token_ids = 0, []
                group.idle_beams.append(parent)
        beams: list[Sequence] = []
        for place, token_id in survivors:
            beam = parent = parents[place]
            if place in chosen:
                chosen.remove(place)  # the best child goes on in its parent's place
            else:
                beam = group.idle_beams.pop()
                beam.table = parent.table.fork()
                beam.num_computed_tokens = parent.num_computed_tokens
                beam.token_ids = parent.token_ids.copy()
                self._forked.append((beam.row, 0, beam.table.blocks.copy()))
            beams.append(beam)
            self._row_forks.append(RowFork(beam.row, parent.row, token_id))
        for beam, (_, token_id) in zip(beams, survivors, strict=True):
            beam.token_ids.append(token_id)
        group.sequences = beams
        return []

    def _conclude(self, group: SequenceGroup, search: BeamSearch) -> list[SequenceDelta]:
        """The search is over: its best hypotheses are the samples, each in one piece."""
        found = search.hypotheses(group.request.params.n)
        deltas = [_delta(group, index) for index in range(group.request.params.n)]
        for delta, hypothesis in zip(deltas, found, strict=False):
            delta.token_ids = hypothesis.token_ids
            delta.cumulative_logprob = hypothesis.cumulative_logprob
            delta.logprobs = hypothesis.logprobs
            delta.finish_reason = hypothesis.finish_reason
            delta.stop_reason = hypothesis.stop_reason
            self._stats.total_generated_tokens += len(hypothesis.token_ids)
        for delta in deltas[len(found) :]:
            delta.error = f"the beam search found {len(found)} sequences: the tokens allowed leave no more"
            delta.finish_reason = FinishReason.ERROR
        self._queues.drop_all(group)
        return deltas

    def _fail(self, group: SequenceGroup, error: str) -> list[SequenceDelta]:
        """A beam cannot go on, and the search means nothing without it."""
        for sequence in group.sequences:
            self._distrust(sequence)
        deltas = [_delta(group, index) for index in range(group.request.params.n)]
        for delta in deltas:
            delta.error, delta.finish_reason = error, FinishReason.ERROR
        self._queues.drop_all(group)
        return deltas

    def _distrust(self, sequence: Sequence) -> None:
        """What made a sample fail may sit in the KV, where the next request of this prefix would find it."""
        sequence.table.forget_hashes()
        if self._transfers is not None:
            self._transfers.evict(sequence)
        sequence.num_computed_tokens = 0


def _finish(delta: SequenceDelta, request: Request, *, complete: bool) -> None:
    """Why a sequence ends after the delta's last token; `complete`: its grammar lets nothing follow."""
    token_id, delta.finish_reason = delta.token_ids[-1], FinishReason.STOP
    if token_id in request.eos_token_ids:
        return
    if token_id in request.params.stop_token_ids:
        delta.stop_reason = token_id
    elif complete:
        delta.ends_with_text = True
    else:
        delta.finish_reason = FinishReason.LENGTH


def _delta(group: SequenceGroup, index: int) -> SequenceDelta:
    """What is true of every delta, no token yet."""
    counts = RequestCounts(
        group.first_scheduled_time,
        group.num_cached_tokens,
        group.num_preemptions,
        group.num_draft_tokens,
        group.num_accepted_tokens,
    )
    return SequenceDelta(group.request.request_id, index, [], counts=counts)
