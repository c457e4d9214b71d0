"""ResultProcessor: applies a step's result to the sequences that were in it.

Computed tokens advance, samples are appended, full blocks are hashed. The samples of a prompt and the beams of a search
fork. Sequences that have ended leave. The only decision made here is whether a sequence has ended.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from quire.errors import BEAMS_MISSING
from quire.kv_cache.block_pool import BlockPool
from quire.outputs import RequestCounts, SampleId, SequenceDelta, StepDeltas
from quire.request import FinishReason, Request
from quire.scheduler.beam_search import BeamSearch, Survivor
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.decode_batch import DecodeStep
from quire.scheduler.length_curve import Ending
from quire.scheduler.prefix_lookup import PrefixLookup
from quire.scheduler.registered_prefixes import RegisteredPrefixes
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.sequence import NO_ROW, Sequence, SequenceGroup
from quire.scheduler.service import OUTPUT_TOKEN
from quire.scheduler.step_totals import StepTotals
from quire.step import RowFork, StepPlan, StepResult, TokenLogprobs

_ENDINGS: dict[str, Ending] = {FinishReason.STOP: Ending.NATURAL, FinishReason.LENGTH: Ending.LIMIT}

TableEntries = tuple[int, int, int, list[int]]
"""Entries of a table that forked, as in `StepPlan.new_blocks`."""


@dataclass(slots=True)
class StepInFlight:
    """A step that is planned and whose result is not processed yet."""

    plan: StepPlan
    rows: list[Sequence | None]
    """The sequence in each row when it was planned."""
    decode_step: DecodeStep | None = None


class ResultProcessor:
    """Owned by the scheduler."""

    def __init__(
        self,
        pool: BlockPool,
        queues: RequestQueues,
        lookup: PrefixLookup,
        offload: BlockOffload | None,
        prefixes: RegisteredPrefixes,
        totals: StepTotals,
    ) -> None:
        self._pool = pool
        self._queues = queues
        self._counts_service = queues.waiting.counts_service
        self._lookup = lookup
        self._offload = offload
        self._prefixes = prefixes
        self._totals = totals
        self._forked: list[TableEntries] = []
        self._row_forks: list[RowFork] = []

    def take_forks(self) -> tuple[list[TableEntries], list[RowFork]]:
        """Tables that forked and beams that went on since the last call, for the next plan."""
        forked, row_forks = self._forked, self._row_forks
        self._forked, self._row_forks = [], []
        return forked, row_forks

    def process(
        self,
        plan: StepPlan,
        result: StepResult,
        step: StepInFlight,
        num_kept: SequenceOf[int],
        num_in_flight: int,
        *,
        fills_decode_batch: bool,
    ) -> StepDeltas:
        """Apply the result to every sequence of the plan that is still there. Returns what each sample gained.

        `num_kept` is the number of tokens computed in each row that stay: drafts that were rejected do not.
        `num_in_flight` steps were planned after this one. With `fills_decode_batch`, sequences that only decode from
        now on join the batch.
        """
        deltas = StepDeltas()
        samples: list[SampleId] = []
        token_ids: list[int] = []
        first = 0
        if step.decode_step is not None:
            first = len(step.decode_step.sequences)
            samples, token_ids = self._update_decode_batch(deltas, result, step.decode_step, num_in_flight)
            if len(token_ids) == len(plan.rows):
                deltas.batch_id = plan.batch_id
        if first < len(plan.rows):
            self._advance_rows(plan, step.rows, num_kept, first)
            if result.prompt_logprobs:
                self._report_prompts(deltas, plan, result, step.rows)
            if plan.pool_rows:
                self._finish_vectors(deltas, plan, result, step.rows)
            joining = self._append_samples(deltas, plan, result, step.rows, first)
            if fills_decode_batch and joining:
                self._queues.add_to_decode_batch(joining, num_in_flight)
        if token_ids:
            deltas.samples = [*samples, *deltas.samples] if deltas.samples else samples
            deltas.token_ids = token_ids + deltas.token_ids
        self._totals.total_steps += bool(plan.rows)
        return deltas

    def _update_decode_batch(
        self, deltas: StepDeltas, result: StepResult, step: DecodeStep, num_in_flight: int
    ) -> tuple[list[SampleId], list[int]]:
        """Advance the sequences of the decode batch. The ends and failures among them are added to `deltas`.

        Returns the samples that gained a token and nothing else, and their tokens.
        """
        num_rows = len(step.sequences)
        errors = result.errors[:num_rows]
        failed = [place for place, error in enumerate(errors) if error is not None] if any(errors) else ()
        sampled = result.token_ids[:num_rows]
        apart, token_ids = self._queues.decode_batch.update(step, sampled, failed, named_ahead=num_in_flight > 0)
        samples, going_on = step.samples, step.sequences
        if apart:
            gone = set(apart)
            kept = [place for place in range(num_rows) if place not in gone]
            samples, going_on = [samples[place] for place in kept], [going_on[place] for place in kept]
            for place in apart:
                self._finish_decoding(deltas, step, place, sampled[place], errors[place])
        self._totals.total_generated_tokens += len(token_ids)
        if self._counts_service:
            for sequence in going_on:
                self._queues.waiting.serve(sequence.group.request.tenant, OUTPUT_TOKEN)
        return samples, token_ids

    def _finish_decoding(
        self, deltas: StepDeltas, step: DecodeStep, place: int, token_id: int, error: str | None
    ) -> None:
        """Give a sequence of the decode batch that fails or ends its last token."""
        sequence = step.sequences[place]
        if sequence.row == NO_ROW:
            return
        if sequence.in_decode_batch:
            self._queues.remove_from_decode_batch(sequence)
        sequence.advance(step.positions[place] + 1)
        sequence.drop_unknown_token()
        self._extend(deltas, sequence, [token_id], None, error)

    def _advance_rows(
        self, plan: StepPlan, rows: SequenceOf[Sequence | None], num_kept: SequenceOf[int], first: int
    ) -> None:
        """Count the computed tokens of the rows from `first` on, and hash the blocks that they filled."""
        block_size = self._pool.block_size
        for place in range(first, len(plan.rows)):
            sequence, count = rows[plan.rows[place]], num_kept[place]
            if sequence is None or sequence.row == NO_ROW:
                continue
            start = plan.num_computed_tokens[place]
            end = start + count
            sequence.advance(end)
            if end % block_size < count:  # a block was filled
                sequence.table.hash_full_blocks(sequence.token_ids, end)
                sequence.table.give_back(end)
            group = sequence.group
            if start < group.num_prompt_tokens:
                self._totals.total_prompt_tokens += min(end, group.num_prompt_tokens) - start
                if len(group.sequences) > 1 and end >= group.num_prompt_tokens and sequence is group.leader:
                    self._share_prompt(group)

    def _append_samples(
        self,
        deltas: StepDeltas,
        plan: StepPlan,
        result: StepResult,
        rows: SequenceOf[Sequence | None],
        first: int,
    ) -> list[Sequence]:
        """Append the samples from `first` on. Returns the sequences that may only decode from now on."""
        place, sample_rows, sampled = first, plan.sample_rows, list[Sequence]()
        terminated, extra = set(result.terminated), result.extra_token_ids
        while place < len(sample_rows):
            sequence, index = rows[sample_rows[place]], place
            place += 1
            if sequence is None or sequence.row == NO_ROW:
                continue
            group = sequence.group
            if group.beam_search is not None:
                place = index + len(group.sequences)  # its beams stand side by side
                self._advance_beams(deltas, group, group.beam_search, result, range(index, place))
                continue
            if sequence.token_ids[-1] < 0:
                sequence.drop_unknown_token()
            token_ids = [result.token_ids[index]]
            if extra:
                token_ids += extra.get(index, ())
            own, error = result.logprobs[index], result.errors[index]
            logprobs = None if own is None else [own, *result.extra_logprobs.get(index, ())]
            self._extend(deltas, sequence, token_ids, logprobs, error, terminated=index in terminated)
            if group.only_decodes:
                sampled.append(sequence)
        return sampled

    def _share_prompt(self, group: SequenceGroup) -> None:
        """The leader has the prompt's KV: the others fork from it, except where more of their own output is cached."""
        forked = [group.leader]
        for sequence in group.sequences[1:]:
            if sequence.num_computed_tokens:
                continue  # it started with another leader
            if sequence.num_output_tokens and self._lookup.has_output(sequence, forked):
                continue
            self._queues.fork(group.leader, sequence)
            self._forked += sequence.table.entries(sequence.row, 0)
            forked.append(sequence)

    def _report_prompts(
        self, deltas: StepDeltas, plan: StepPlan, result: StepResult, rows: SequenceOf[Sequence | None]
    ) -> None:
        """Report the log-probabilities of prompt tokens in `deltas`."""
        for index, entries in result.prompt_logprobs.items():
            sequence = rows[plan.rows[index]]
            if sequence is not None and sequence.row != NO_ROW:
                delta = self._prompt_delta(sequence, entries)
                if delta is not None:
                    deltas.others.append(delta)

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

    def _finish_vectors(
        self, deltas: StepDeltas, plan: StepPlan, result: StepResult, rows: SequenceOf[Sequence | None]
    ) -> None:
        """Report vectors in `deltas` and end their sequences."""
        for index in plan.pool_rows:
            sequence = rows[plan.rows[index]]
            if sequence is None or sequence.row == NO_ROW:
                continue
            delta = _delta(sequence.group, sequence.index)
            deltas.others.append(delta)
            delta.vector, delta.error = result.vectors.get(index), result.vector_errors.get(index)
            delta.finish_reason = FinishReason.STOP
            if delta.error is not None:
                delta.finish_reason = FinishReason.ERROR
                self._poison(sequence)
            self._queues.drop(sequence)

    def _extend(
        self,
        deltas: StepDeltas,
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None,
        error: str | None,
        *,
        terminated: bool = False,
    ) -> None:
        """Append a sample and its extra tokens, up to where the sequence ends, and report them in `deltas`.

        `terminated`: its grammar lets nothing follow.
        """
        group, tokens, ends = sequence.group, sequence.token_ids, False
        for place, token_id in enumerate(token_ids if error is None else (), start=1):
            tokens.append(token_id)
            if token_id in group.stop_ids or len(tokens) >= group.max_num_tokens:
                ends, terminated = True, terminated and place == len(token_ids)
                del token_ids[place:]
                break
        if error is None:
            self._totals.total_generated_tokens += len(token_ids)
            if self._counts_service:
                self._queues.waiting.serve(group.request.tenant, OUTPUT_TOKEN * len(token_ids))
            if sequence.was_reported and not ends and not terminated and logprobs is None and len(token_ids) == 1:
                deltas.samples.append(sequence.sample)
                deltas.token_ids += token_ids
                return
        delta = _delta(group, sequence.index)
        deltas.others.append(delta)
        sequence.was_reported = True
        if error is not None:
            delta.error, delta.finish_reason = error, FinishReason.ERROR
            self._poison(sequence)
        else:
            delta.token_ids = token_ids
            if logprobs is not None:
                delta.logprobs = logprobs[: len(token_ids)]
            if ends or terminated:
                _set_finish_reason(delta, group.request, terminated=terminated)
                self._prefixes.complete(group.request.request_id, sequence.table)
        if delta.finish_reason is not None:
            self._queues.drop(sequence, _ENDINGS.get(delta.finish_reason, Ending.ABORTED))

    def _advance_beams(
        self, deltas: StepDeltas, group: SequenceGroup, search: BeamSearch, result: StepResult, places: range
    ) -> None:
        """Process the samples of a group's beams, which stand at `places` of the result."""
        error = next((result.errors[place] for place in places if result.errors[place] is not None), None)
        if error is not None:
            deltas.others += self._fail(group, error)
            return
        survivors = search.advance([result.candidates[place] for place in places])
        if search.done:
            deltas.others += self._conclude(group, search)
        else:
            self._fork_beams(group, survivors)

    def _fork_beams(self, group: SequenceGroup, survivors: list[Survivor]) -> None:
        """Survivors fork from their parents, and the blocks of the other beams are free (paper, section 4.4)."""
        parents, chosen = group.sequences, {survivor.parent for survivor in survivors}
        for place, parent in enumerate(parents):
            if place not in chosen:
                self._queues.discard(parent)
                parent.token_ids = []
                group.idle_beams.append(parent)
        beams: list[Sequence] = []
        for place, token_id in survivors:
            beam = parent = parents[place]
            if place in chosen:
                chosen.remove(place)  # the best child goes on in its parent's place
            else:
                beam = group.idle_beams.pop()
                self._queues.fork(parent, beam)
                beam.token_ids = parent.token_ids.copy()
                self._forked += beam.table.entries(beam.row, 0)
            beams.append(beam)
            self._row_forks.append(RowFork(beam.row, parent.row, token_id))
        for beam, (_, token_id) in zip(beams, survivors, strict=True):
            beam.token_ids.append(token_id)
        group.sequences = beams

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
            self._totals.total_generated_tokens += len(hypothesis.token_ids)
        for delta in deltas[len(found) :]:
            delta.error = f"{BEAMS_MISSING} {len(found)} sequences: the tokens allowed leave no more"
            delta.finish_reason = FinishReason.ERROR
        self._queues.drop_all(group)
        return deltas

    def _fail(self, group: SequenceGroup, error: str) -> list[SequenceDelta]:
        """A beam cannot go on, and the search means nothing without it."""
        for sequence in group.sequences:
            self._poison(sequence)
        deltas = [_delta(group, index) for index in range(group.request.params.n)]
        for delta in deltas:
            delta.error, delta.finish_reason = error, FinishReason.ERROR
        self._queues.drop_all(group)
        return deltas

    def _poison(self, sequence: Sequence) -> None:
        """Evict what a failed sequence computed: its KV may hold the cause, and the next request with this prefix would
        find it."""
        if sequence.in_decode_batch:
            self._queues.remove_from_decode_batch(sequence)
        sequence.table.remove_hashes()
        if self._offload is not None:
            self._offload.evict(sequence)
        if self._queues.states is not None:
            self._queues.states.forget(sequence)
        sequence.discard_computed()


def _set_finish_reason(delta: SequenceDelta, request: Request, *, terminated: bool) -> None:
    """Say why a sequence ends after the delta's last token; `terminated`: its grammar lets nothing follow."""
    token_id, delta.finish_reason = delta.token_ids[-1], FinishReason.STOP
    if token_id in request.eos_token_ids:
        return
    if token_id in request.params.stop_token_ids:
        delta.stop_reason = token_id
    elif terminated:
        delta.ends_with_text = True
    else:
        delta.finish_reason = FinishReason.LENGTH


def _delta(group: SequenceGroup, index: int) -> SequenceDelta:
    """A delta without tokens, with the request's counts."""
    counts = RequestCounts(
        group.first_scheduled_time,
        group.num_cached_tokens,
        group.num_preemptions,
        group.num_draft_tokens,
        group.num_accepted_tokens,
    )
    return SequenceDelta(group.request.request_id, index, [], counts=counts)
