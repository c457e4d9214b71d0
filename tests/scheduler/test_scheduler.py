"""The scheduler against a runner that computes nothing but remembers everything.

`FakeRunner` knows what a real runner knows, the plans. The "KV" of a token is a hash of that token and the KV
before it, read through the row's block table: a wrong block, copy, order or position shows in the next token.
Tokens follow from the context alone, so every request must get the tokens it would get if it were alone, whatever
else happens.
"""

import contextlib
import random
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Literal
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.config import SpeculativeConfig
from quire.errors import RequestError
from quire.kv_cache.block_pool import BlockPool
from quire.outputs import SampleId, SequenceDelta
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.scheduler import length_curve
from quire.scheduler.draft_planner import Candidate, DraftPlanner
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.policies import ADMISSIONS, SCHEDULING_POLICIES
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.step_planner import equal_shares
from quire.step import BeamCandidates, NewRow, StepPlan, StepResult, TokenLogprobs
from quire.structured_outputs import StructuredOutputsParams

EOS = 15
STOP_TOKEN = 14
NOTHING = -1

# -- the model of a model ---------------------------------------------------------------------------------------------


def kv_of(previous: int, token_id: int) -> int:
    return (previous * 1_000_003 + token_id + 1) % (2**61 - 1)


def kv_of_all(token_ids: list[int]) -> list[int]:
    kv, values = 0, []
    for token_id in token_ids:
        kv = kv_of(kv, token_id)
        values.append(kv)
    return values


def next_token(kv: int, seed: int, sample_index: int) -> int:
    """What comes after a context. Mostly small numbers, so that samples part late and contents are often equal."""
    draw = random.Random(f"{kv} {seed} {sample_index}").randrange(40)
    return draw if draw in (EOS, STOP_TOKEN) else draw % 3


def followers(kv: int) -> list[tuple[int, float]]:
    """What may come after a context in a beam search: every token with its log-probability, the likeliest first."""
    rng = random.Random(f"{kv} beams")
    return sorted(((token, -rng.uniform(0.1, 4.0)) for token in range(EOS + 1)), key=lambda pair: -pair[1])


def is_faulty(kv: int, seed: int) -> bool:
    return seed < 0 and kv % 5 == 0


def is_whole(kv: int) -> bool:
    """Whether the text of a context is whole, for a request with a grammar."""
    return kv % 23 == 0


@dataclass
class Ending:
    """How one sample goes if its request is alone."""

    token_ids: list[int]
    finish_reason: str


def searched(request: Request) -> list[Ending]:
    """A beam search by its plain definition: all candidates of all beams, sorted."""
    params = request.params
    width, penalty = params.beam_width or 0, params.length_penalty
    enders = {*request.eos_token_ids, *params.stop_token_ids}
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    while live:
        contexts = [kv_of_all([*request.prompt_token_ids, *tokens])[-1] for _, tokens in live]
        if any(is_faulty(kv, request.seed) for kv in contexts):
            return [Ending([], "error")] * params.n
        candidates = [
            (score + logprob, [*tokens, token])
            for (score, tokens), kv in zip(live, contexts, strict=True)
            for token, logprob in followers(kv)
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        length = len(live[0][1]) + 1
        ended = [tokens[-1] in enders or length == request.max_tokens for _, tokens in candidates]
        for (score, tokens), is_end in list(zip(candidates, ended, strict=True))[:width]:
            if is_end:
                finished.append((score / length**penalty, tokens))
        finished = sorted(finished, key=lambda hypothesis: -hypothesis[0])[:width]
        live = [candidate for candidate, is_end in zip(candidates, ended, strict=True) if not is_end][:width]
        if live and len(finished) == width:
            reach = request.max_tokens if params.early_stopping == "never" and penalty > 0 else length
            if params.early_stopping is True or live[0][0] / reach**penalty <= finished[-1][0]:
                break
    return [Ending(tokens, "stop" if tokens[-1] in enders else "length") for _, tokens in finished[: params.n]]


def alone(request: Request, index: int) -> Ending:
    if request.params.beam_width is not None:
        return searched(request)[index]
    token_ids: list[int] = []
    while True:
        kv = kv_of_all([*request.prompt_token_ids, *token_ids])[-1]
        if is_faulty(kv, request.seed):
            return Ending(token_ids, "error")
        token_ids.append(next_token(kv, request.seed, index))
        if token_ids[-1] in (*request.eos_token_ids, *request.params.stop_token_ids):
            return Ending(token_ids, "stop")
        if request.params.structured_outputs is not None and is_whole(kv_of(kv, token_ids[-1])):
            return Ending(token_ids, "stop")
        if len(token_ids) == request.max_tokens:
            return Ending(token_ids, "length")


@dataclass
class Row:
    """What a runner remembers of a row. The block table is never cleared, as the rows of an array are not."""

    new_row: NewRow
    token_ids: list[int]
    blocks: list[int]


class FakeRunner:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.memory = [[NOTHING] * block_size for _ in range(num_blocks)]
        self.rows: dict[int, Row] = {}
        self.num_forced = 0

    def execute(self, plan: StepPlan) -> StepResult:
        sources = {fork.source: self.rows[fork.source] for fork in plan.row_forks}
        for fork in plan.row_forks:
            source, old = sources[fork.source], self.rows.get(fork.row)
            token_ids = [*source.token_ids, fork.token_id]
            self.rows[fork.row] = Row(source.new_row, token_ids, old.blocks if old else [])
        for new_row in plan.new_rows:
            old = self.rows.get(new_row.row)
            token_ids = [*new_row.prompt_token_ids, *new_row.output_token_ids]
            self.rows[new_row.row] = Row(new_row, token_ids, old.blocks if old else [])
        for row, first, blocks in plan.new_blocks:
            if row in self.rows:
                table = self.rows[row].blocks
                table += [NOTHING] * (first + len(blocks) - len(table))
                table[first : first + len(blocks)] = blocks
        copied = {pair[0] for pair in plan.block_copies}
        destinations = [pair[1] for pair in plan.block_copies]
        assert len(set(destinations)) == len(destinations)
        assert not copied & set(destinations), "copies would depend on their order"
        for source, destination in plan.block_copies:
            self.memory[destination] = self.memory[source].copy()
        self._compute(plan)
        return self._sample(plan)

    def _compute(self, plan: StepPlan) -> None:
        assert len(plan.rows) == len(plan.num_computed_tokens) == len(plan.num_scheduled_tokens) == len(set(plan.rows))
        assert sum(plan.num_scheduled_tokens) == len(plan.token_ids)
        written: set[tuple[int, int]] = set()
        drafts = {plan.sample_rows[index]: draft for index, draft in plan.drafts.items()}
        first = 0
        for row_index, start, count in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            row = self.rows[row_index]
            token_ids = row.token_ids + drafts.get(row_index, [])
            assert count > 0
            assert plan.token_ids[first : first + count] == token_ids[start : start + count]
            for position in range(start, start + count):
                previous = self.kv_at(row, position - 1) if position else 0
                slot = row.blocks[position // self.size], position % self.size
                assert slot not in written, "two rows write one slot"
                written.add(slot)
                self.memory[slot[0]][slot[1]] = kv_of(previous, token_ids[position])
            first += count
        for row_index, start, count in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            row = self.rows[row_index]
            read = [self.kv_at(row, position) for position in range(start + count)]
            token_ids = row.token_ids + drafts.get(row_index, [])
            assert read == kv_of_all(token_ids[: start + count]), "the context does not read back"

    def _sample(self, plan: StepPlan) -> StepResult:
        result = StepResult()
        assert plan.sample_indices == sorted(plan.sample_indices)
        for index, row_index in zip(plan.sample_indices, plan.sample_rows, strict=True):
            row, computed = self.rows[row_index], self.rows[plan.rows[index]]
            draft = plan.drafts.get(len(result.token_ids), [])
            end = plan.num_computed_tokens[index] + plan.num_scheduled_tokens[index] - len(draft)
            assert end == len(row.token_ids), "a sample is drawn after the sequence's last token"
            kv = self.kv_at(computed, end - 1)
            assert kv == kv_of_all(row.token_ids)[-1]
            new_row = row.new_row
            result.errors.append("logits are not finite" if is_faulty(kv, new_row.seed) else None)
            if new_row.params.beam_width is not None:
                count = new_row.params.beam_width + len(new_row.stop_token_ids)
                tokens, logprobs = zip(*followers(kv)[:count], strict=True)
                reports = [TokenLogprobs([token], [logprob], [1]) for token, logprob in followers(kv)[:count]]
                result.candidates[len(result.token_ids)] = BeamCandidates(list(tokens), list(logprobs), reports)
                result.token_ids.append(NOTHING)
                result.logprobs.append(None)
                continue
            token_id = next_token(kv, new_row.seed, new_row.sample_index)
            row.token_ids.append(token_id)
            result.token_ids.append(token_id)
            result.logprobs.append(TokenLogprobs([token_id], [-1.0], [1]) if new_row.params.logprobs else None)
            if not is_faulty(kv, new_row.seed):
                self._accept(row, computed, draft, end, result)
            if new_row.params.structured_outputs is not None and not is_faulty(kv, new_row.seed):
                self._follow_grammar(row, result)
        for index, (_, targets) in plan.prompt_logprobs.items():
            start, row = plan.num_computed_tokens[index], self.rows[plan.rows[index]]
            assert targets == row.new_row.prompt_token_ids[start + 1 : start + 1 + plan.num_scheduled_tokens[index]]
            result.prompt_logprobs[index] = [
                TokenLogprobs([target], [-float(start + offset)], [1]) for offset, target in enumerate(targets)
            ]
        return result

    def _accept(self, row: Row, computed: Row, draft: list[int], end: int, result: StepResult) -> None:
        """Draw again after each token of a draft that holds, from what stands in the memory there."""
        place, new_row = len(result.token_ids) - 1, row.new_row
        for offset, drafted in enumerate(draft):
            kv = self.kv_at(computed, end + offset)
            if drafted != row.token_ids[-1] or is_faulty(kv, new_row.seed):
                break
            if new_row.params.structured_outputs is not None and is_whole(kv):
                break
            row.token_ids.append(next_token(kv, new_row.seed, new_row.sample_index))
            result.extra_token_ids.setdefault(place, []).append(row.token_ids[-1])
            if new_row.params.logprobs:
                logprobs = TokenLogprobs([row.token_ids[-1]], [-1.0], [1])
                result.extra_logprobs.setdefault(place, []).append(logprobs)

    def _follow_grammar(self, row: Row, result: StepResult) -> None:
        """Up to three tokens that would be sampled next, as a grammar that leaves no choice knows them."""
        place, new_row = len(result.token_ids) - 1, row.new_row
        kv = kv_of_all(row.token_ids)[-1]
        for _ in range(kv % 4):
            if is_whole(kv) or is_faulty(kv, new_row.seed):
                break
            row.token_ids.append(next_token(kv, new_row.seed, new_row.sample_index))
            result.extra_token_ids.setdefault(place, []).append(row.token_ids[-1])
            kv = kv_of(kv, row.token_ids[-1])
            self.num_forced += 1
        if is_whole(kv):
            result.terminated.append(place)

    def kv_at(self, row: Row, position: int) -> int:
        return self.memory[row.blocks[position // self.size]][position % self.size]


class Guesses(DraftPlanner):
    """Drafts of any length in most steps, some of which are right: what comes next, with a wrong token now and then.
    Sequences may go in decode_batch from any step to the next."""

    def __init__(self, seed: int, max_tokens: int) -> None:
        super().__init__(SpeculativeConfig(num_speculative_tokens=max_tokens))
        self._random = random.Random(seed)
        self._looks_next = True
        self.groups: dict[str, SequenceGroup] = {}

    @property
    def pauses(self) -> bool:
        return self._random.random() < 0.5

    @property
    def looks_next(self) -> bool:
        return self._looks_next

    def begin_step(self) -> bool:
        looks, self._looks_next = self._looks_next, self._random.random() < 0.7
        return looks

    def choose(
        self, candidates: SequenceOf[Candidate], num_tokens: int, max_drafted: int, now: float
    ) -> list[list[int]]:
        sequences = {id(s.token_ids): s for group in self.groups.values() for s in group.sequences}
        drafts = []
        for _, token_ids, most in candidates:
            assert most >= 0
            sequence, draft = sequences[id(token_ids)], list[int]()
            length = max(0, min(most, max_drafted, self._random.randrange(self.max_tokens + 1)))
            for _ in range(length):
                token = next_token(kv_of_all([*token_ids, *draft])[-1], sequence.group.request.seed, sequence.index)
                draft.append(token if self._random.random() < 0.8 else 3)
            max_drafted -= length
            drafts.append(draft)
        return drafts


@dataclass
class Client:
    """What the sender of a request has received so far."""

    request: Request
    token_ids: dict[int, list[int]]
    finish_reasons: dict[int, str] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


class Engine:
    """Scheduler, pool and fake runner in a loop, with every promise checked in every step."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        *,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_num_partial_prefills: int = 4,
        enable_prefix_caching: bool = True,
        guesses: DraftPlanner | None = None,
        overlaps: bool = False,
        num_failures: int = 0,
        policy: str = "fcfs",
        admission: str = "current",
    ) -> None:
        """With `overlaps` a step's result is late: it comes when the next step is planned, where that can be. A device
        has `num_failures` times no memory for a step of more than one token."""
        self.overlaps = overlaps
        self.num_failures = num_failures
        self.random = random.Random(num_failures)
        self.in_flight: tuple[StepPlan, StepResult] | None = None
        self.num_ahead = 0
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.runner = FakeRunner(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.pool,
            SchedulerLimits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=256,
                max_num_partial_prefills=max_num_partial_prefills,
            ),
            speculation=guesses,
            make_queue=SCHEDULING_POLICIES[policy],
            make_rule=ADMISSIONS[admission],
            clock=lambda: 1.0,
        )
        if isinstance(guesses, Guesses):
            guesses.groups = self.scheduler._queues.by_id
        self.clients: dict[str, Client] = {}
        self.request_ids: dict[int, str] = {}
        """Identity of a prompt's list → its request."""
        self.num_steps = 0
        self.last_plans: dict[int, StepPlan] = {}
        """The newest batch id → the last plan that had it."""
        self.num_repeated = 0
        """Plans that repeated the one before."""
        self.last_samples: dict[int, list[SampleId]] = {}
        """Batch id → the samples of the last deltas that had it."""

    def add(self, request: Request) -> Client:
        self.scheduler.add(request)
        resumed = request.output_token_ids or {index: [] for index in range(request.params.n)}
        client = Client(request, {index: list(token_ids) for index, token_ids in resumed.items()})
        self.clients[request.request_id] = client
        self.request_ids[id(request.prompt_token_ids)] = request.request_id
        return client

    def step(self) -> StepPlan:
        if self.in_flight is None:
            running = [sequence for group in self.scheduler._queues.running for sequence in group.sequences]
            self.rows_without_kv = {sequence.row for sequence in running if sequence.num_computed_tokens == 0}
            plan = self.scheduler.schedule()
            self.check_plan(plan)
            result = self.launch(plan)
            if result is None:
                self.scheduler.roll_back(plan)
                self.check()
                return plan
            self.in_flight = plan, result
        (plan, result), self.in_flight = self.in_flight, None
        ahead, failed = self.scheduler.schedule_ahead(plan) if self.overlaps else None, False
        if ahead is not None:
            next_result = self.launch(ahead)
            failed = next_result is None
            if next_result is not None:
                self.in_flight = ahead, next_result
                self.num_ahead += 1
        self.update(plan, result)
        if failed and ahead is not None:
            self.scheduler.roll_back(ahead)
        self.num_steps += 1
        self.check()
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> None:
        deltas = self.scheduler.update(plan, result)
        if deltas.batch_id:
            assert deltas.batch_id == plan.batch_id
            assert not deltas.others
            known = self.last_samples.setdefault(deltas.batch_id, deltas.samples)
            assert deltas.samples is known, "the samples of one batch are one list"
        self.receive(deltas)

    def check_repetition(self, plan: StepPlan) -> None:
        """A step with a batch id decodes and does nothing else, and goes on where the last one of this id ended."""
        num_rows = len(plan.rows)
        assert plan.batch_id >= 0
        if not plan.batch_id:
            return
        assert plan.sample_rows == plan.rows
        assert plan.sample_indices == list(range(num_rows))
        assert plan.num_scheduled_tokens == [1] * num_rows
        assert len(plan.token_ids) == num_rows > 0
        assert plan.new_rows == plan.row_forks == plan.block_copies == []
        assert plan.drafts == plan.prompt_logprobs == {}
        assert all(first > 0 for _, first, _ in plan.new_blocks)
        last = self.last_plans.get(plan.batch_id)
        if last is not None:
            assert plan.rows == last.rows
            assert plan.num_computed_tokens == [position + 1 for position in last.num_computed_tokens]
            self.num_repeated += 1
        else:
            assert plan.batch_id > max(self.last_plans, default=0), "an id never comes back"
        self.last_plans = {plan.batch_id: plan}

    def launch(self, plan: StepPlan) -> StepResult | None:
        """What a device makes of a plan; None where it has no memory. It knows the tokens that it has drawn."""
        self.check_repetition(plan)
        if plan.num_tokens > 1 and self.num_failures and self.random.random() < 0.2:
            self.num_failures -= 1
            self.runner.execute(
                StepPlan(
                    new_rows=plan.new_rows,
                    row_forks=plan.row_forks,
                    new_blocks=plan.new_blocks,
                    block_copies=self.random.choice([plan.block_copies, []]),
                )
            )
            return None
        known = [self.runner.rows[~token].token_ids[-1] if token < 0 else token for token in plan.token_ids]
        return self.runner.execute(replace(plan, token_ids=known))

    def run(self, max_steps: int = 1_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "no end in sight"
        assert self.pool.num_free == self.pool.num_blocks

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        self.clients.pop(request_id, None)
        assert request_id not in self.scheduler._queues.by_id
        self.check()

    def stop(self, request_id: str, index: int) -> None:
        self.scheduler.stop(request_id, index)
        if request_id in self.clients:
            self.clients[request_id].finish_reasons[index] = "stopped by its text"
            self.forget_finished()
        self.check()

    def receive(self, deltas: Iterable[SequenceDelta]) -> None:
        for delta in deltas:
            client = self.clients[delta.request_id]
            assert delta.index not in client.finish_reasons, "a sample that ended goes on"
            token_ids = client.token_ids[delta.index]
            token_ids += delta.token_ids
            client.prompt_logprobs += delta.prompt_logprobs or []
            ending = alone(client.request, delta.index)
            assert token_ids == ending.token_ids[: len(token_ids)]
            if delta.finish_reason is not None:
                assert (token_ids, delta.finish_reason) == (ending.token_ids, ending.finish_reason)
                client.finish_reasons[delta.index] = delta.finish_reason
            if client.request.params.prompt_logprobs is None:
                assert client.prompt_logprobs == []
            elif delta.token_ids:
                prompt = client.request.prompt_token_ids
                expected = [([token], [-float(start)]) for start, token in enumerate(prompt[1:])]
                assert [(entry.token_ids, entry.logprobs) for entry in client.prompt_logprobs] == expected
        self.forget_finished()

    def forget_finished(self) -> None:
        for request_id, client in list(self.clients.items()):
            if client.finish_reasons.keys() >= client.token_ids.keys():
                assert request_id not in self.scheduler._queues.by_id
                del self.clients[request_id]

    def check_plan(self, plan: StepPlan) -> None:
        scheduler = self.scheduler
        assert bool(plan.rows) == scheduler.has_work
        assert 0 <= plan.num_tokens <= scheduler.limits.max_num_batched_tokens
        new_rows = {new_row.row for new_row in plan.new_rows}
        assert len(new_rows) == len(plan.new_rows)
        starting = new_rows | self.rows_without_kv
        decoding = {
            sequence.row
            for group in scheduler._queues.running
            if not (
                group.advances_together
                and any(other.num_missing_tokens != 1 or other.row in starting for other in group.sequences)
            )
            for sequence in group.sequences
            if sequence.in_decode_batch
            or (sequence.num_missing_tokens == 1 and sequence.num_output_tokens and sequence.row not in starting)
        }
        assert set(plan.rows[: len(decoding)]) == decoding, "whoever decodes is in every step, and comes first"

    def check(self) -> None:
        scheduler, pool = self.scheduler, self.pool
        assert scheduler._queues.by_id.keys() == self.clients.keys()
        sequences = [s for group in scheduler._queues.by_id.values() for s in (*group.sequences, *group.idle_beams)]
        running = [s for group in scheduler._queues.running for s in (*group.sequences, *group.idle_beams)]
        assert [group.order for group in scheduler._queues.running] == sorted(
            {g.order for g in scheduler._queues.running}
        )
        assert len(scheduler._queues.running) + len(scheduler._queues.waiting) == len(scheduler._queues.by_id)
        assert pool.num_references == sum(len(sequence.table.blocks) for sequence in sequences)
        assert pool.num_free == len(list(pool.free_order())) == pool.ref_counts.count(0)
        assert {sequence.row for sequence in running} == {
            row for row, sequence in enumerate(scheduler._queues.rows) if sequence is not None
        }
        assert len(running) + len(scheduler._queues.free_rows) == scheduler.limits.max_num_seqs
        for sequence in sequences:
            assert len(sequence.table.blocks) * pool.block_size - sequence.table.num_tokens < pool.block_size
            if self.in_flight is None:
                assert sequence.in_decode_batch or sequence.table.num_tokens == sequence.num_computed_tokens
                assert all(token >= 0 for token in sequence.token_ids)
            if sequence not in running:
                assert (sequence.table.blocks, sequence.row) == ([], -1)
        self.check_decode_batch()
        for group in scheduler._queues.running:
            held = {block for sequence in group.sequences for block in sequence.table.blocks}
            assert len(held) <= group.max_blocks(pool.block_size)
        if not scheduler._queues.by_id:
            assert pool.num_free == pool.num_blocks
        stats = scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (
            len(scheduler._queues.running),
            len(scheduler._queues.waiting),
        )
        assert stats.num_used_blocks == pool.num_blocks - pool.num_free

    def check_decode_batch(self) -> None:
        """The block tables of members lag within a block, their counts and the pool's sum do not; nobody else's do."""
        groups, pool = self.scheduler._queues, self.pool
        num_filled = sum(fill for fill, count in zip(pool.fill, pool.ref_counts, strict=True) if count)
        for sequence in groups.decode_batch.sequences:
            assert sequence.num_missing_tokens == 1
            assert all(token >= 0 for token in sequence.token_ids)
            num_unseen = len(sequence.token_ids) - 1 + (self.in_flight is not None) - sequence.table.num_tokens
            assert 0 <= num_unseen < pool.block_size
            num_filled += num_unseen
        assert pool.num_filled_slots == num_filled
        not_in_decode_batch = [group for group in groups.running if not all(s.in_decode_batch for s in group.sequences)]
        assert [group for group in groups.not_in_decode_batch if group in not_in_decode_batch] == not_in_decode_batch
        members = {s for group in groups.by_id.values() for s in group.sequences if s.in_decode_batch}
        assert members == set(groups.decode_batch.sequences)
        assert len(members) == len(groups.decode_batch.sequences)


def new_request(
    request_id: str,
    prompt: int | list[int],
    max_tokens: int = 8,
    *,
    n: int = 1,
    seed: int = 1,
    priority: int = 0,
    salt: str = "",
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    resumed: dict[int, list[int]] | None = None,
    can_stop: bool = False,
    beam_width: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    structured: bool = False,
) -> Request:
    """A request with a prompt of its own of a given length, or with a given one. It ends by length unless told.

    A `structured` one follows a grammar: tokens may be forced on it, and it ends where its text is whole.
    """
    if isinstance(prompt, int):
        rng = random.Random(request_id)
        prompt = [rng.randrange(100, 1_000) for _ in range(prompt)]
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(
            n=n,
            prompt_logprobs=prompt_logprobs,
            logprobs=None if structured else logprobs,
            structured_outputs=StructuredOutputsParams(regex="any") if structured else None,
            stop_token_ids=(STOP_TOKEN,) if can_stop else (),
            beam_width=beam_width,
            length_penalty=1.0 if beam_width is None else length_penalty,
            early_stopping=False if beam_width is None else early_stopping,
        ),
        seed=seed,
        eos_token_ids=(EOS,) if can_stop else (),
        max_tokens=max_tokens,
        priority=priority,
        cache_salt=salt,
        tenant=salt,
        output_token_ids=resumed or {},
    )


def counts_by_request(engine: Engine, plan: StepPlan) -> dict[str, int]:
    """Tokens computed in a step that was just executed."""
    counts: dict[str, int] = {}
    for row, count in zip(plan.rows, plan.num_scheduled_tokens, strict=True):
        request_id = engine.request_ids[id(engine.runner.rows[row].new_row.prompt_token_ids)]
        counts[request_id] = counts.get(request_id, 0) + count
    return counts


# -- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "wants", "shares"),
    [
        (100, [1000, 10, 40], [50, 10, 40]),
        (100, [], []),
        (0, [3, 4], [0, 0]),
        (10, [3, 4], [3, 4]),
        (10, [9, 9, 9], [4, 3, 3]),
        (1, [5, 3, 3], [0, 1, 0]),
        (7, [1, 100], [1, 6]),
    ],
)
def test_equal_shares(budget: int, wants: list[int], shares: list[int]) -> None:
    assert equal_shares(budget, wants) == shares


def test_a_request_from_end_to_end() -> None:
    engine = Engine()
    client = engine.add(new_request("a", 10, max_tokens=5))
    plan = engine.step()
    assert (plan.num_scheduled_tokens, plan.sample_indices, plan.sample_rows) == ([10], [0], plan.rows)
    assert [engine.step().num_scheduled_tokens for _ in range(4)] == [[1]] * 4
    assert not engine.scheduler.has_work
    assert client.finish_reasons == {0: "length"}
    assert engine.step().rows == []


def test_a_long_prompt_is_computed_in_chunks() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add(new_request("a", 20, max_tokens=2))
    plans = [engine.step() for _ in range(4)]
    assert [(plan.num_computed_tokens, plan.num_scheduled_tokens, plan.sample_indices) for plan in plans] == [
        ([0], [8], []),
        ([8], [8], []),
        ([16], [4], [0]),
        ([20], [1], [0]),
    ]


def test_running_sequences_decode_first_and_prompts_get_the_rest() -> None:
    engine = Engine(max_num_batched_tokens=16)
    for name in "abc":
        engine.add(new_request(name, 4, max_tokens=20))
    engine.step()
    engine.add(new_request("long", 40, max_tokens=2))
    plan = engine.step()
    assert plan.num_scheduled_tokens == [1, 1, 1, 13]


def test_a_long_prompt_does_not_starve_short_ones() -> None:
    engine = Engine(max_num_batched_tokens=32)
    engine.add(new_request("long", 200, max_tokens=1))
    engine.step()
    for name in "abc":
        engine.add(new_request(name, 6, max_tokens=1))
    plan = engine.step()
    assert sorted(plan.num_scheduled_tokens) == [6, 6, 6, 14]
    assert engine.clients.keys() == {"long"}


def test_as_many_prompts_share_a_step_as_are_allowed() -> None:
    engine = Engine(max_num_batched_tokens=32, max_num_partial_prefills=2)
    for name in "abcd":
        engine.add(new_request(name, 40, max_tokens=1))
    assert counts_by_request(engine, engine.step()) == {"a": 16, "b": 16}


def test_a_budget_of_one_token_a_step_serves_everybody() -> None:
    engine = Engine(max_num_seqs=1, max_num_batched_tokens=1)
    for name in "abc":
        engine.add(new_request(name, 5, max_tokens=3))
    engine.run(max_steps=3 * (5 + 3))


# -- who comes first --------------------------------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    engine = Engine(max_num_seqs=1)
    for name in "abc":
        engine.add(new_request(name, 4, max_tokens=2))
    order = []
    while engine.scheduler.has_work:
        order += counts_by_request(engine, engine.step())
    assert order == ["a", "a", "b", "b", "c", "c"]


def test_priority_goes_before_arrival() -> None:
    engine = Engine(max_num_seqs=1)
    for name, priority in (("later", 1), ("normal", 0), ("first", -1), ("normal too", 0)):
        engine.add(new_request(name, 4, max_tokens=1, priority=priority))
    order = []
    while engine.scheduler.has_work:
        order += counts_by_request(engine, engine.step())
    assert order == ["first", "normal", "normal too", "later"]


def test_the_latest_yields_when_memory_runs_short_and_resumes_first() -> None:
    engine = Engine(num_blocks=6, block_size=4)
    for name in "ab":
        engine.add(new_request(name, 8, max_tokens=12))
    engine.add(new_request("c", 4, max_tokens=1))
    while engine.scheduler.stats().total_preemptions == 0:
        engine.step()
    assert [group.request.request_id for group in engine.scheduler._queues.running] == ["a"]
    preempted = engine.scheduler._queues.by_id["b"]
    assert (preempted.num_preemptions, preempted.leader.num_computed_tokens) == (1, 0)
    engine.run()


def test_the_least_important_yields_even_if_it_came_first() -> None:
    engine = Engine(num_blocks=6, block_size=4)
    engine.add(new_request("batch", 8, max_tokens=12, priority=1))
    engine.step()
    engine.add(new_request("urgent", 8, max_tokens=12))
    while engine.scheduler.stats().total_preemptions == 0:
        engine.step()
    assert [group.request.request_id for group in engine.scheduler._queues.running] == ["urgent"]
    engine.run()


def test_what_was_preempted_resumes_from_the_prefix_cache() -> None:
    engine = Engine(num_blocks=6, block_size=4)
    for name in "ab":
        engine.add(new_request(name, 8, max_tokens=12))
    while engine.scheduler.stats().total_preemptions == 0:
        engine.step()
    engine.abort("a")
    plan = engine.step()
    assert plan.num_computed_tokens[0] >= 8
    engine.run()


def test_admission_waits_for_room_for_the_whole_prompt_and_a_watermark() -> None:
    engine = Engine(num_blocks=200, block_size=4, max_num_batched_tokens=256)
    engine.add(new_request("a", 250, max_tokens=2))
    engine.add(new_request("b", 250, max_tokens=2))
    engine.add(new_request("c", 250, max_tokens=2))
    engine.add(new_request("d", 37, max_tokens=2))
    engine.step()
    assert engine.scheduler.stats().num_running == 3
    assert engine.scheduler.stats().num_waiting == 1, "63 + 63 + 63 + 10 of 200 blocks leave less than two"


def test_a_group_that_yields_in_the_middle_of_its_turn_is_not_in_the_plan() -> None:
    """One of its samples has its copy already when there is no block for the next."""
    engine = Engine(num_blocks=5, block_size=4)
    engine.add(new_request("a", 4, max_tokens=4))
    engine.add(new_request("b", 6, max_tokens=2, n=3))
    engine.step()
    plan = engine.step()
    assert (plan.num_scheduled_tokens, plan.block_copies, len(plan.new_blocks)) == ([1], [], 3), (
        "2 forks of b, 1 block of a"
    )
    assert engine.scheduler._queues.by_id["b"].num_preemptions == 1
    engine.run()


def test_prompts_that_hold_all_blocks_make_room_for_the_first() -> None:
    """A step that could compute nothing would be a standstill."""
    engine = Engine(num_blocks=6, block_size=4, max_num_batched_tokens=8)
    engine.add(new_request("a", 4, max_tokens=20))
    for _ in range(4):
        engine.step()
    engine.add(new_request("b", 16, max_tokens=1))
    engine.run()


# -- drafts -----------------------------------------------------------------------------------------------------------


class AllRight(Guesses):
    """The longest drafts, all of them what comes next."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(0, max_tokens)
        self._random.randrange = lambda *_: max_tokens  # type: ignore[method-assign,assignment]
        self._random.random = lambda: 0.0  # type: ignore[method-assign]


def test_drafts_that_hold_save_steps() -> None:
    engine = Engine(guesses=AllRight(3))
    engine.add(new_request("a", 6, max_tokens=14))
    plans = [engine.step() for _ in range(5)]
    assert [plan.num_scheduled_tokens for plan in plans] == [[6], [4], [4], [4], [1]], (
        "the last token is drawn and not computed"
    )
    assert not engine.scheduler.has_work
    stats = engine.scheduler.stats()
    assert (stats.total_drafts, stats.total_draft_tokens, stats.total_accepted_tokens) == (3, 9, 9)


def test_a_draft_ends_before_a_sample_that_fails() -> None:
    engine = Engine(guesses=AllRight(9))
    client = engine.add(new_request("a", 3, max_tokens=100, seed=-3))
    engine.run()
    assert (client.finish_reasons, len(client.token_ids[0]), engine.num_steps) == ({0: "error"}, 4, 3)
    assert engine.scheduler.stats().total_preemptions == 0


def test_drafts_take_no_memory_that_others_may_need() -> None:
    engine = Engine(num_blocks=6, block_size=4, guesses=AllRight(9))
    engine.add(new_request("a", 8, max_tokens=4))
    engine.add(new_request("b", 8, max_tokens=4))
    engine.step()
    assert engine.step().drafts == {}, "of two free blocks each may need one"
    engine.run()
    assert engine.scheduler.stats().total_preemptions == 0


# -- the door ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        (new_request("a", []), "prompt", "the prompt is empty: it must hold at least one token"),
        (
            new_request("a", 250, 7),
            "max_tokens",
            "the prompt has 250 tokens and max_tokens is 7; together they exceed the context of 256 tokens",
        ),
        (new_request("a", 1, n=9), "n", "n is 9, but at most 8 sequences run at once (max_num_seqs)"),
        (
            new_request("a", 40, 26),
            "max_tokens",
            "1 sequences of 40 prompt + 26 output tokens can need 17 KV blocks of 4 tokens, but the pool has 16; "
            "ask for less or raise kv_cache_memory",
        ),
        (
            new_request("a", 41, 7, n=4),
            "max_tokens",
            "4 sequences of 41 prompt + 7 output tokens can need 18 KV blocks of 4 tokens, but the pool has 16; "
            "ask for less or raise kv_cache_memory",
        ),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(request_: Request, param: str, message: str) -> None:
    engine = Engine(num_blocks=16)
    with pytest.raises(RequestError) as caught:
        engine.add(request_)
    assert (caught.value.param, caught.value.message) == (param, message)
    assert not engine.scheduler.has_work


def test_an_id_in_use_is_refused() -> None:
    engine = Engine()
    engine.add(new_request("a", 4))
    with pytest.raises(RequestError, match="request id a is in use"):
        engine.scheduler.add(new_request("a", 4))
    engine.run()
    engine.add(new_request("a", 4))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("prompt", [1, 4, 7])
def test_what_passes_the_door_runs_in_a_pool_of_exactly_its_size(n: int, block_size: int, prompt: int) -> None:
    request = new_request("a", prompt, max_tokens=9, n=n)
    shared = prompt // block_size
    exactly = shared + n * (-(-(prompt + 8) // block_size) - shared)
    with pytest.raises(RequestError, match=f"can need {exactly} KV blocks"):
        Engine(exactly - 1, block_size).add(request)
    engine = Engine(exactly, block_size)
    engine.add(request)
    engine.run(max_steps=20)
    assert engine.scheduler.stats().total_preemptions == 0


def test_a_request_as_large_as_the_pool_needs_no_watermark() -> None:
    engine = Engine(200, 1, max_num_batched_tokens=256)
    engine.add(new_request("a", 200, max_tokens=1))
    engine.run(max_steps=1)


# -- leaving ----------------------------------------------------------------------------------------------------------


def test_abort_frees_in_the_same_call_wherever_the_request_is() -> None:
    engine = Engine(max_num_seqs=4, max_num_batched_tokens=8, enable_prefix_caching=False)
    for name in ("decoding", "half computed", "queued"):
        engine.add(new_request(name, 4 if name == "decoding" else 30, n=2))
        engine.step()
    for name in ("half computed", "queued", "decoding", "decoding", "unknown"):
        engine.abort(name)
    assert (engine.pool.num_free, engine.scheduler.has_work) == (64, False)


def test_stop_ends_one_sample_and_the_others_go_on() -> None:
    engine = Engine()
    client = engine.add(new_request("a", 6, n=3))
    engine.step()
    engine.step()
    used = engine.pool.num_used
    engine.stop("a", 1)
    assert engine.pool.num_used == used - 1
    engine.stop("a", 1)
    engine.stop("unknown", 0)
    engine.run()
    assert sorted(client.finish_reasons) == [0, 1, 2]


def test_end_tokens_and_stop_tokens() -> None:
    reasons = set()
    for seed in range(40):
        engine = Engine()
        client = engine.add(new_request("a", 3, max_tokens=12, seed=seed, can_stop=True))
        deltas: list[SequenceDelta] = []
        while engine.scheduler.has_work:
            plan = engine.scheduler.schedule()
            deltas = list(engine.scheduler.update(plan, engine.runner.execute(plan)))
            engine.receive(deltas)
        last = client.token_ids[0][-1]
        assert deltas[0].stop_reason == (STOP_TOKEN if last == STOP_TOKEN else None)
        reasons.add((last if last in (EOS, STOP_TOKEN) else 0, deltas[0].finish_reason))
    assert reasons == {(EOS, "stop"), (STOP_TOKEN, "stop"), (0, "length")}


def test_a_sample_that_fails_ends_alone_and_leaves_nothing_to_find() -> None:
    engine = Engine()
    prompts = ([number] * 9 for number in range(100, 200))
    prompt = next(prompt for prompt in prompts if is_faulty(kv_of_all(prompt)[-1], seed=-1))
    client = engine.add(new_request("faulty", prompt, seed=-1))
    engine.add(new_request("healthy", 9))
    engine.step()
    assert client.finish_reasons == {0: "error"}
    assert engine.clients.keys() == {"healthy"}
    engine.add(new_request("same prefix", [*prompt, 5]))
    engine.step()
    assert engine.scheduler._queues.by_id["same prefix"].num_cached_tokens == 0
    engine.run()


# -- samples of one request -------------------------------------------------------------------------------------------


def test_the_prompt_of_a_group_is_computed_and_stored_once() -> None:
    engine = Engine()
    engine.add(new_request("a", 10, n=4))
    plan = engine.step()
    assert (plan.num_scheduled_tokens, plan.sample_indices) == ([10], [0, 0, 0, 0])
    assert len(set(plan.sample_rows)) == 4
    assert (engine.pool.num_used, engine.pool.num_references) == (3, 12)
    plan = engine.step()
    assert plan.num_scheduled_tokens == [1] * 4
    assert len(plan.block_copies) == 3, "the last holder writes in place"
    assert engine.pool.num_used == 2 + 4
    while engine.scheduler.has_work:
        assert engine.step().block_copies == []


def test_samples_part_without_a_copy_where_a_block_is_full() -> None:
    engine = Engine()
    engine.add(new_request("a", 8, n=3))
    engine.run()
    assert engine.pool.total_block_copies == 0


def test_a_group_waits_until_all_its_samples_have_a_row() -> None:
    engine = Engine(max_num_seqs=4)
    engine.add(new_request("a", 4, max_tokens=3, n=2))
    engine.add(new_request("b", 4, max_tokens=3, n=3))
    engine.add(new_request("c", 4, max_tokens=3, n=1))
    engine.step()
    assert engine.scheduler.stats().num_running == 1
    engine.run()


def preempted_group(prompt: int, n: int, *, enable_prefix_caching: bool = True) -> Engine:
    """An engine in which group b was just preempted for the sake of a, and a is gone."""
    shared = prompt // 4
    num_blocks = max(10, shared + n * (-(-(prompt + 29) // 4) - shared))
    engine = Engine(num_blocks, 4, enable_prefix_caching=enable_prefix_caching)
    engine.add(new_request("a", 8, max_tokens=30))
    engine.add(new_request("b", prompt, max_tokens=30, n=n))
    for _ in range(40):
        if engine.scheduler.stats().total_preemptions == 0:
            engine.step()
    assert engine.scheduler._queues.by_id["b"].num_preemptions == 1
    engine.abort("a")
    return engine


@pytest.mark.parametrize("prompt", [1, 6, 8, 9])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_preempted_group_is_resumed_as_one_from_what_is_cached(prompt: int, n: int) -> None:
    engine = preempted_group(prompt, n)
    group = engine.scheduler._queues.by_id["b"]
    missing = sum(sequence.num_output_tokens for sequence in group.sequences) + prompt
    computed = engine.step().num_tokens
    if n > 1:
        computed += engine.step().num_tokens
    engine.scheduler.update_fill()
    assert all(sequence.num_missing_tokens == 1 for sequence in group.sequences)
    assert computed <= min(missing, prompt + n * 6), "full blocks are found again"
    assert len({sequence.table.blocks[0] for sequence in group.sequences}) == (1 if prompt >= 4 else n)
    assert engine.step().num_scheduled_tokens == [1] * n
    engine.run()


def test_a_preempted_group_is_resumed_without_a_cache() -> None:
    engine = preempted_group(9, 3, enable_prefix_caching=False)
    group = engine.scheduler._queues.by_id["b"]
    missing = sum(sequence.num_output_tokens for sequence in group.sequences) + 9
    computed = [engine.step().num_tokens for _ in range(2)]
    engine.scheduler.update_fill()
    assert all(sequence.num_missing_tokens == 1 for sequence in group.sequences)
    assert sum(computed) == missing, "the prompt is computed once then, too"
    engine.run()


# -- beam search ------------------------------------------------------------------------------------------------------


def test_beams_fork_and_free_and_copy_one_block_at_most() -> None:
    engine = Engine(num_blocks=64, block_size=4)
    engine.add(new_request("a", 9, max_tokens=24, n=2, beam_width=4, early_stopping="never"))
    group = engine.scheduler._queues.by_id["a"]
    assert engine.step().num_scheduled_tokens == [9], "the prompt is computed once"
    assert (len(group.sequences), len(group.idle_beams)) == (4, 0)
    assert engine.pool.num_used == 3, "and stored once"
    while engine.scheduler.has_work:
        plan = engine.step()
        assert plan.num_scheduled_tokens == [1] * 4
        assert len(plan.block_copies) <= 3
        solo = sum(len(sequence.table.blocks) for sequence in group.sequences)
        if group.sequences:
            assert engine.pool.num_used <= solo - 3 * 2, "at least the prompt's full blocks are shared by all"


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("prompt", "width"), [(1, 3), (6, 2), (8, 3), (9, 4)])
@pytest.mark.parametrize("budget", [8, 64])
def test_preempted_beams_catch_up_before_any_of_them_goes_on(
    prompt: int, width: int, caching: bool, budget: int
) -> None:
    engine = Engine(enable_prefix_caching=caching, max_num_batched_tokens=budget)
    engine.add(new_request("a", prompt, max_tokens=30, beam_width=width, early_stopping="never"))
    group = engine.scheduler._queues.by_id["a"]
    for num_steps in (14, 4, 3):
        for _ in range(num_steps):
            engine.step()
        engine.scheduler._queues.preempt(group)
        engine.check()
        lengths = [len(sequence.token_ids) for sequence in group.sequences]
        assert len(set(lengths)) == 1
        while not (sampled := engine.step().sample_rows):
            assert [len(sequence.token_ids) for sequence in group.sequences] == lengths
        assert len(sampled) == width
    engine.run()


def test_samples_whose_own_blocks_are_gone_resume_behind_their_leader() -> None:
    """It goes on from its output at once; the others compute the end of the prompt again, each by itself."""
    engine = Engine(num_blocks=40, block_size=4)
    engine.add(new_request("a", 10, max_tokens=30, n=3))
    for _ in range(12):
        engine.step()
    group = engine.scheduler._queues.by_id["a"]
    leader = group.leader
    engine.scheduler._queues.preempt(group)
    kept = leader.table.find_prefix(leader.token_ids)
    assert len(kept) == 5
    for block in kept:
        engine.pool.share(block)
    for block in [engine.pool.allocate() for _ in range(engine.pool.num_free)]:
        engine.pool.release(block)
    for block in reversed(kept):
        engine.pool.release(block)
    assert engine.step().num_computed_tokens == [20]
    assert engine.step().num_computed_tokens == [22, 8, 8]
    engine.run()


def test_a_lone_beam_that_resumes_with_one_token_missing_goes_on_at_once() -> None:
    engine = Engine(block_size=4)
    engine.add(new_request("a", 9, max_tokens=12, beam_width=1))
    for _ in range(4):
        engine.step()
    engine.scheduler._queues.preempt(engine.scheduler._queues.by_id["a"])
    plan = engine.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens, len(plan.sample_rows)) == ([12], [1], 1)
    engine.run()


@pytest.mark.parametrize("index", [0, 1, 5])
def test_aborted_beams_free_everything_at_once(index: int) -> None:
    engine = Engine(num_blocks=64, block_size=4)
    engine.add(new_request("a", 9, max_tokens=24, beam_width=4))
    for _ in range(index):
        engine.step()
    engine.abort("a")
    assert engine.pool.num_free == 64
    assert len(engine.scheduler._queues.free_rows) == 8


def test_more_beams_than_rows_are_refused() -> None:
    with pytest.raises(RequestError, match="beam_width is 9, but at most 8 sequences run at once"):
        Engine().add(new_request("a", 4, beam_width=9))


@pytest.mark.parametrize("prompt", [1, 4, 6])
@pytest.mark.parametrize("lengths", [(2, 0, 3), (0, 0, 5), (5, 1, 1), (0, 4, 0)])
def test_requests_go_on_from_what_an_earlier_process_generated(prompt: int, lengths: tuple[int, ...]) -> None:
    request = new_request("a", prompt, n=3)
    resumed = {index: alone(request, index).token_ids[:length] for index, length in enumerate(lengths)}
    engine = Engine()
    client = engine.add(new_request("a", prompt, n=3, resumed=resumed))
    plan = engine.step()
    assert plan.num_scheduled_tokens == [prompt]
    assert len(plan.sample_rows) == lengths.count(0), "all that have no token part where the prompt ends"
    engine.run(max_steps=10)
    assert sorted(client.finish_reasons) == [0, 1, 2]


def test_only_unfinished_samples_are_resumed() -> None:
    request = new_request("a", 6, n=3)
    engine = Engine()
    client = engine.add(new_request("a", 6, n=3, resumed={2: alone(request, 2).token_ids[:3]}))
    engine.run()
    assert client.finish_reasons == {2: "length"}


def test_a_group_whose_leader_leaves_before_the_others_forked() -> None:
    request = new_request("a", 6, n=3)
    resumed = {index: alone(request, index).token_ids[:5] for index in range(3)}
    engine = Engine(max_num_batched_tokens=8, max_num_seqs=4)
    engine.add(new_request("b", 4))
    engine.step()
    engine.add(new_request("a", 6, n=3, resumed=resumed))
    engine.step()
    engine.stop("a", 0)
    engine.run(max_steps=20)


# -- shared prefixes --------------------------------------------------------------------------------------------------


def test_a_prefix_is_found_and_not_computed_again() -> None:
    engine = Engine()
    prompt = list(range(100, 112))
    engine.add(new_request("a", prompt, max_tokens=3))
    engine.run()
    engine.add(new_request("b", [*prompt, 7], max_tokens=3))
    engine.add(new_request("other salt", [*prompt, 7], max_tokens=3, salt="other"))
    plan = engine.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens) == ([12, 0], [1, 13])
    assert engine.scheduler._queues.by_id["b"].num_cached_tokens == 12
    stats = engine.scheduler.stats()
    assert (stats.total_prefix_queries, stats.total_prefix_hits) == (12 + 13 + 13, 12)


def test_the_last_token_of_a_cached_prompt_is_computed() -> None:
    engine = Engine()
    prompt = list(range(100, 112))
    for name in "ab":
        engine.add(new_request(name, prompt, max_tokens=1))
        plan = engine.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens) == ([11], [1])
    assert len(plan.block_copies) == 1


def test_a_prompt_goes_on_from_inside_a_block() -> None:
    engine = Engine()
    first = list(range(100, 112))
    engine.add(new_request("first", first, max_tokens=1))
    engine.run()
    for name, parted, start in (("a", 6, 6), ("b", 9, 9), ("c", 8, 8), ("none", 0, 0)):
        engine.add(new_request(name, [*first[:parted], 7, 8, 9, 7, 8, 9], max_tokens=3))
        plan = engine.step()
        assert plan.num_computed_tokens == [start]
        assert len(plan.block_copies) == (start % 4 > 0)
        engine.run()


def test_a_prompt_that_fills_the_pool_starts_without_a_block_to_copy() -> None:
    engine = Engine(num_blocks=2)
    engine.add(new_request("first", [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1))
    engine.run()
    engine.add(new_request("second", [1, 2, 3, 4, 5, 6, 7, 9], max_tokens=1))
    plan = engine.step()
    assert (plan.num_computed_tokens, plan.block_copies) == ([4], []), "the source would take the room of the copy"


# -- registered prefixes ----------------------------------------------------------------------------------------------


def register(engine: "Engine", name: str, prompt: list[int], salts: tuple[str, ...] = ("",)) -> None:
    engine.scheduler.register_prefix(new_request(name, prompt, max_tokens=1, salt=salts[0]), salts)
    while name not in engine.scheduler.prefixes:
        plan = engine.scheduler.schedule()
        engine.scheduler.update(plan, engine.runner.execute(plan))


def test_a_registered_prefix_is_found_under_all_its_salts_until_it_is_removed() -> None:
    engine = Engine(num_blocks=16)
    prefix = list(range(100, 110))
    register(engine, "p", prefix, ("one", "two"))
    pool, scheduler = engine.pool, engine.scheduler
    assert (scheduler.stats().num_pinned_blocks, pool.num_used) == (2, 2)

    def cached(name: str, salt: str) -> int:
        scheduler.add(new_request(name, [*prefix[:8], 7, 7], max_tokens=1, salt=salt))
        plan = scheduler.schedule()
        scheduler.update(plan, engine.runner.execute(plan))
        return plan.num_computed_tokens[0]

    assert [cached(f"a{salt}", salt) for salt in ("one", "two", "three")] == [8, 8, 0]
    pool.forget_hashes()
    assert [cached(f"b{salt}", salt) for salt in ("one", "two", "three")] == [8, 8, 0]
    register(engine, "q", prefix[:4], ("two",))
    assert scheduler.stats().num_pinned_blocks == 2, "they share the first block"
    scheduler.prefixes.remove("p")
    assert scheduler.stats().num_pinned_blocks == 1
    pool.forget_hashes()
    assert [cached(f"c{salt}", salt) for salt in ("one", "two")] == [4, 4]
    scheduler.prefixes.remove("q")
    assert (pool.num_free, pool.num_references) == (pool.num_blocks, 0)


def test_what_registered_prefixes_hold_is_no_requests() -> None:
    engine = Engine(num_blocks=8)
    register(engine, "p", list(range(100, 108)))
    scheduler = engine.scheduler
    with pytest.raises(RequestError, match=r"takes 3 more KV blocks .* hold 2 and may hold 4 of the pool's 8"):
        register(engine, "q", list(range(200, 212)))
    with pytest.raises(RequestError, match="the prefix id p is in use"):
        register(engine, "p", list(range(200, 212)))
    with pytest.raises(RequestError, match=r"can need 7 KV blocks .* has 8, of which 2 are registered prefixes'"):
        scheduler.add(new_request("long", 20, max_tokens=9))
    scheduler.add(new_request("begins with it", [*range(100, 108), *range(12)], max_tokens=9))
    with pytest.raises(RequestError, match=r"a request in flight can need 7 KV blocks, and the prefix would leave 4"):
        register(engine, "r", list(range(200, 208)))
    scheduler.add(new_request("fits", 16, max_tokens=9))
    while scheduler.has_work:
        plan = scheduler.schedule()
        scheduler.update(plan, engine.runner.execute(plan))
    assert scheduler.stats().num_used_blocks == scheduler.stats().num_pinned_blocks == 2


def test_an_aborted_registration_leaves_nothing() -> None:
    engine = Engine()
    scheduler = engine.scheduler
    scheduler.register_prefix(new_request("p", 20, max_tokens=1), ("",))
    assert scheduler.prefixes.num_blocks == 5
    scheduler.schedule()
    scheduler.abort("p")
    assert scheduler.prefixes.num_blocks == 0
    assert "p" not in scheduler.prefixes


# Steps whose results are late


def test_decoding_is_planned_ahead_until_the_last_token() -> None:
    engine = Engine(overlaps=True)
    for index in range(3):
        engine.add(new_request(f"request {index}", [index, 1, 1], 12, can_stop=False))
    engine.run()
    assert engine.num_ahead == 11  # all but the first step, since where a sequence ends by length is known
    assert engine.num_steps == 12


def test_a_sequence_that_ends_while_the_next_step_runs_is_forgotten() -> None:
    engine = Engine(overlaps=True)
    requests = [new_request("a", [index % 3, index], 40, can_stop=True) for index in range(100)]
    request = next(r for r in requests if len(alone(r, 0).token_ids) in range(3, 20))
    client = engine.add(request)
    other = engine.add(new_request("b", [1, 1], 60, can_stop=False))
    engine.run()
    assert client.token_ids[0] == alone(request, 0).token_ids
    assert len(other.token_ids[0]) == 60
    assert engine.num_ahead > 40


@pytest.mark.parametrize("leave", ["abort", "stop"])
def test_who_leaves_while_a_step_runs_frees_everything(leave: str) -> None:
    engine = Engine(overlaps=True, max_num_seqs=2)
    engine.add(new_request("a", [0] * 6, 40, can_stop=False))
    for _ in range(4):
        engine.step()
    assert engine.in_flight is not None
    if leave == "abort":
        engine.abort("a")
    else:
        engine.stop("a", 0)
    assert engine.pool.num_free == engine.pool.num_blocks
    engine.add(new_request("b", [0] * 6, 40, can_stop=False))  # takes the row, and finds the blocks
    engine.run()


def test_beams_are_not_planned_ahead() -> None:
    engine = Engine(overlaps=True)
    engine.add(new_request("a", [0, 1], 6, n=2, beam_width=3))
    engine.run()
    assert engine.num_ahead == 0


def test_a_step_for_which_there_is_no_memory_is_planned_again_and_smaller() -> None:
    engine = Engine(max_num_batched_tokens=64)
    for index in range(6):
        engine.add(new_request(f"request {index}", [index % 3, 1, 1], 12, can_stop=False))
    for _ in range(3):
        engine.step()
    plan = engine.scheduler.schedule()
    assert len(plan.rows) == 6
    engine.scheduler.roll_back(plan)
    engine.check()
    assert engine.scheduler.stats().num_running == 0
    smaller = engine.step()
    assert smaller.num_tokens == 3
    first = [group.request.request_id for group in engine.scheduler._queues.running]
    assert first == [f"request {index}" for index in range(len(first))]
    engine.run()
    assert engine.scheduler.stats().total_preemptions == 6


def test_a_step_taken_back_holds_no_block_for_its_copies() -> None:
    engine = Engine()
    engine.add(new_request("a", list(range(100, 108)), max_tokens=1))
    engine.run()
    engine.add(new_request("b", [*range(100, 106), 1, 1]))
    plan = engine.scheduler.schedule()
    assert len(plan.block_copies) == 1
    engine.scheduler.roll_back(plan)
    engine.check()
    engine.run()


def test_the_next_turn_goes_on_in_the_block_that_the_last_one_left() -> None:
    engine = Engine()
    client = engine.add(new_request("a", 10, max_tokens=5))
    engine.run()
    conversation = [*client.request.prompt_token_ids, *client.token_ids[0], 1, 1]
    engine.add(new_request("b", conversation))
    plan = engine.step()
    # The last token of the answer was never computed.
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens, plan.block_copies) == ([14], [3], [])
    engine.run()


def test_a_sample_that_failed_leaves_no_block() -> None:
    engine = Engine()
    requests = [new_request(f"{number}", 10, 24, seed=-1, n=2) for number in range(20)]
    for request in requests:
        engine.add(request)
    engine.run()
    endings = [alone(request, index) for request in requests for index in range(2)]
    assert {ending.finish_reason for ending in endings} == {"error"}
    assert all(engine.pool.names[block] is not None for block in engine.pool.children)


def test_one_prefix_asked_for_many_times_at_once_is_computed_once() -> None:
    engine = Engine(num_blocks=128, max_num_batched_tokens=32, max_num_seqs=16)
    prefix = list(range(100, 160))
    for number in range(8):
        engine.add(new_request(f"{number}", [*prefix, number, 1, 1, 1], max_tokens=4))
    engine.add(new_request("other", 10, max_tokens=4))
    assert counts_by_request(engine, engine.step()) == {"0": 22, "other": 10}
    engine.run()
    assert engine.scheduler.stats().total_prompt_tokens == 60 + 8 * 4 + 10


def test_nobody_waits_for_a_prefix_that_will_not_be_found() -> None:
    engine = Engine(enable_prefix_caching=False)
    prompt = list(range(100, 116))
    for name in "ab":
        engine.add(new_request(name, list(prompt)))
    assert counts_by_request(engine, engine.step()) == {"a": 16, "b": 16}


def test_who_waited_for_a_prefix_goes_on_when_its_owner_leaves() -> None:
    engine = Engine(max_num_batched_tokens=8)
    prompt = list(range(100, 130))
    engine.add(new_request("a", prompt))
    engine.add(new_request("b", [*prompt, 1]))
    engine.step()
    engine.step()
    assert engine.scheduler.stats().num_waiting == 1
    engine.abort("a")
    plan = engine.step()
    assert plan.num_computed_tokens == [16]
    engine.run()


# -- log-probabilities of the prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 2, 8, 30])
@pytest.mark.parametrize("n", [1, 3])
def test_prompt_logprobs_come_once_for_every_position(prompt: int, n: int) -> None:
    engine = Engine(max_num_batched_tokens=8)
    for name in ("one", "two"):
        client = engine.add(new_request(name, list(range(100, 100 + prompt)), n=n, prompt_logprobs=0))
        engine.run()
        assert [entry.token_ids for entry in client.prompt_logprobs] == [[100 + p] for p in range(1, prompt)]


def test_prompt_logprobs_are_neither_lost_nor_repeated_by_a_preemption() -> None:
    engine = Engine(num_blocks=8, max_num_batched_tokens=8)
    engine.add(new_request("a", 4, max_tokens=25))
    client = engine.add(new_request("b", 12, max_tokens=12, prompt_logprobs=2))
    engine.run()
    assert engine.scheduler.stats().total_preemptions > 0
    assert len(client.prompt_logprobs) == 11
    # The check of every step holds them against the prompt.


def test_prompt_logprobs_of_a_prompt_that_starts_over() -> None:
    engine = Engine(num_blocks=4, block_size=4, max_num_batched_tokens=8)
    engine.add(new_request("decoding", 4, max_tokens=9))
    client = engine.add(new_request("stuck", 12, max_tokens=2, prompt_logprobs=0))
    engine.step()
    engine.step()
    assert len(client.prompt_logprobs) == 8
    engine.scheduler._queues.preempt(engine.scheduler._queues.by_id["stuck"])
    engine.step()
    assert len(client.prompt_logprobs) == 8, "these eight positions were computed again"
    engine.run()
    assert len(client.prompt_logprobs) == 11


# -- anything in any order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlaps", [False, True], ids=["one by one", "overlapped"])
@pytest.mark.parametrize("seed", range(24))
def test_crowds_in_a_pool_that_hardly_holds_the_largest_of_them(seed: int, overlaps: bool) -> None:
    """Little memory and much to do: groups preempt each other all the time, and everybody still gets through."""
    rng = random.Random(seed)
    beams = 0.1 if overlaps else 0.4
    block_size = rng.choice([1, 2, 4, 7])
    requests = []
    for number in range(14):
        n = rng.choice([1, 1, 2, 4])
        prompt = [0] * rng.randrange(12) + [rng.randrange(2) for _ in range(rng.randrange(1, 16))]
        request = new_request(
            f"{number}",
            prompt,
            max_tokens=rng.randrange(1, 28),
            n=n,
            seed=rng.randrange(-1, 5),
            priority=rng.randrange(2),
            logprobs=rng.choice([None, None, 1]),
            prompt_logprobs=rng.choice([None, None, 0]),
            can_stop=rng.random() < 0.3,
            beam_width=min(4, n + rng.randrange(3)) if rng.random() < beams else None,
            early_stopping=rng.choice([False, True, "never"]),
            structured=rng.random() < 0.3,
        )
        if rng.random() < 0.3 and request.params.beam_width is None:
            for index in range(n):
                token_ids = alone(request, index).token_ids
                request.output_token_ids[index] = token_ids[: rng.randrange(len(token_ids) + 1)][:-1]
        requests.append(request)
    pool = BlockPool(1, block_size)
    largest = max(SequenceGroup(request, pool, b"", 0).max_blocks(block_size) for request in requests)
    engine = Engine(
        largest + rng.choice([0, 0, 1, 8]),
        block_size,
        max_num_seqs=rng.randrange(4, 12),
        max_num_batched_tokens=rng.choice([12, 20, 100]),
        max_num_partial_prefills=rng.randrange(1, 5),
        enable_prefix_caching=rng.random() < 0.7,
        guesses=Guesses(seed, rng.randrange(1, 9)) if seed % 2 and not overlaps else None,
        overlaps=overlaps,
        num_failures=seed % 3 if overlaps else 0,
    )
    while requests or engine.scheduler.has_work:
        while requests and rng.random() < 0.4:
            engine.add(requests.pop())
        engine.step()
        assert engine.num_steps < 2_000
    assert engine.pool.num_free == engine.pool.num_blocks


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of every kind come, go and are preempted; each gets the tokens it would get alone."""

    def __init__(self) -> None:
        super().__init__()
        self.predicts_early = patch.object(length_curve, "MIN_ANSWERS", 2)
        self.predicts_early.start()

    @initialize(
        num_blocks=st.integers(1, 64),
        block_size=st.integers(1, 8),
        max_num_seqs=st.integers(1, 8),
        more_budget=st.sampled_from([0, 1, 3, 8, 40]),
        max_num_partial_prefills=st.integers(1, 4),
        caching=st.booleans(),
        longest_draft=st.sampled_from([0, 0, 1, 3, 9]),
        overlaps=st.booleans(),
        num_failures=st.sampled_from([0, 0, 1, 5]),
        policy=st.sampled_from(list(SCHEDULING_POLICIES)),
        admission=st.sampled_from(list(ADMISSIONS)),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        more_budget: int,
        max_num_partial_prefills: int,
        caching: bool,
        longest_draft: int,
        overlaps: bool,
        num_failures: int,
        policy: str,
        admission: str,
    ) -> None:
        self.engine = Engine(
            num_blocks,
            block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + more_budget,
            max_num_partial_prefills=max_num_partial_prefills,
            enable_prefix_caching=caching,
            guesses=Guesses(num_blocks, longest_draft) if longest_draft else None,
            overlaps=overlaps,
            num_failures=num_failures,
            policy=policy,
            admission=admission,
        )
        self.num_requests = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        prefix=st.integers(0, 12),
        max_tokens=st.integers(1, 24),
        n=st.sampled_from([1, 1, 2, 4]),
        seed=st.integers(-2, 6),
        priority=st.integers(0, 1),
        salt=st.sampled_from(["", "", "b"]),
        logprobs=st.sampled_from([None, None, 1]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        resumed=st.none() | st.lists(st.integers(0, 20), min_size=4, max_size=4),
        can_stop=st.booleans(),
        more_beams=st.sampled_from([None, None, 0, 1, 3]),
        length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
        early_stopping=st.sampled_from([True, False, "never"]),
        structured=st.sampled_from([False, False, True]),
        times=st.sampled_from([1, 1, 3]),
    )
    def add(
        self,
        prompt: list[int],
        prefix: int,
        max_tokens: int,
        n: int,
        seed: int,
        priority: int,
        salt: str,
        logprobs: int | None,
        prompt_logprobs: int | None,
        resumed: list[int] | None,
        can_stop: bool,
        more_beams: int | None,
        length_penalty: float,
        early_stopping: bool | Literal["never"],
        structured: bool,
        times: int,
    ) -> None:
        for _ in range(times):
            request = new_request(
                f"request {self.num_requests}",
                [0] * prefix + prompt,
                max_tokens,
                n=n,
                seed=seed,
                priority=priority,
                salt=salt,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                can_stop=can_stop,
                beam_width=None if more_beams is None else n + more_beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                structured=structured,
            )
            if resumed is not None and more_beams is None:
                for index, length in enumerate(resumed[:n]):
                    ending = alone(request, index)
                    if length < len(ending.token_ids):
                        request.output_token_ids[index] = ending.token_ids[:length]
            self.num_requests += 1
            # What can never run is refused; that it is refused for good reason has its own test.
            with contextlib.suppress(RequestError):
                self.engine.add(request)
            self.engine.check()

    @precondition(lambda self: self.engine.clients)
    @rule(num_steps=st.integers(1, 20))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step()

    @precondition(lambda self: self.engine.clients)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.clients))))

    @precondition(lambda self: self.engine.clients)
    @rule(data=st.data(), index=st.integers(0, 3))
    def stop(self, data: st.DataObject, index: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.engine.clients)))
        client = self.engine.clients[request_id]
        if index in client.token_ids and client.request.params.beam_width is None:
            self.engine.stop(request_id, index)

    @rule()
    def report(self) -> None:
        self.engine.scheduler.memory_report()
        if self.engine.in_flight is None:
            members = self.engine.scheduler._queues.decode_batch.sequences
            assert all(member.table.num_tokens == member.num_computed_tokens for member in members)

    @rule()
    def forget_hashes(self) -> None:
        self.engine.pool.forget_hashes()

    @precondition(lambda self: self.engine.clients)
    @rule()
    def run_to_the_end(self) -> None:
        tokens = sum(
            (client.request.params.beam_width or len(client.token_ids))
            * (len(client.request.prompt_token_ids) + client.request.max_tokens)
            for client in self.engine.clients.values()
        )
        self.engine.run(max_steps=2 * tokens + 50 * self.engine.num_failures + 2)

    @invariant()
    def the_pool_agrees(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        try:
            if hasattr(self, "engine"):
                self.run_to_the_end()
        finally:
            self.predicts_early.stop()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40, stateful_step_count=30)
