"""FakeRunner: a runner that computes nothing and remembers everything, and the model that it stands for.

The runner knows what a real runner knows: the plans. The "KV" of a token is a hash of that token and the KV before it,
read through the row's block table: a wrong block, copy, order or position shows in the next token. Tokens follow from
the context alone, so every request must get the tokens that it would get alone, whatever else happens (`alone`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from quire.request import Request, Task
from quire.step import BeamCandidates, NewRow, StepPlan, StepResult, TokenLogprobs

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
    vector: bytes | None = None


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


def vector_of(kv: int) -> bytes:
    """What stands for a context whose last token has this KV."""
    return kv.to_bytes(8, "little")


def alone(request: Request, index: int) -> Ending:
    if request.task is Task.EMBED:
        kv = kv_of_all(request.prompt_token_ids)[-1]
        return Ending([], "error") if is_faulty(kv, request.seed) else Ending([], "stop", vector_of(kv))
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
    tables: list[list[int]]
    """One for each KV group."""


class FakeRunner:
    def __init__(self, num_blocks: int, block_size: int, num_states: int = 0, windows: Sequence[int] = (0,)) -> None:
        """With `num_states` slots the KV of a token follows from the recurrent state instead of the KV before it: a
        wrong slot, copy or order shows as well."""
        self.size = block_size
        self.windows = windows
        self.states = [NOTHING] * num_states
        """The KV of the last token that each state has read; 0 before the first."""
        self.memory = [[NOTHING] * block_size for _ in range(num_blocks)]
        self.rows: dict[int, Row] = {}
        self.num_forced = 0

    def execute(self, plan: StepPlan) -> StepResult:
        sources = {fork.source: self.rows[fork.source] for fork in plan.row_forks}
        for fork in plan.row_forks:
            source, old = sources[fork.source], self.rows.get(fork.row)
            token_ids = [*source.token_ids, fork.token_id]
            self.rows[fork.row] = Row(source.new_row, token_ids, old.tables if old else [[] for _ in self.windows])
        for new_row in plan.new_rows:
            old = self.rows.get(new_row.row)
            token_ids = [*new_row.prompt_token_ids, *new_row.output_token_ids]
            self.rows[new_row.row] = Row(new_row, token_ids, old.tables if old else [[] for _ in self.windows])
        for row, group, first, blocks in plan.new_blocks:
            if row in self.rows:
                table = self.rows[row].tables[group]
                table += [NOTHING] * (first + len(blocks) - len(table))
                table[first : first + len(blocks)] = blocks
        copied = {pair[0] for pair in plan.block_copies}
        destinations = [pair[1] for pair in plan.block_copies]
        assert len(set(destinations)) == len(destinations)
        assert not copied & set(destinations), "copies would depend on their order"
        for source, destination in plan.block_copies:
            self.memory[destination] = self.memory[source].copy()
        for source, destination in plan.state_copies:
            self.states[destination] = 0 if source < 0 else self.states[source]
        self.load(plan)
        assert len(plan.state_slots) == len(set(plan.state_slots)) == (len(plan.rows) if self.states else 0)
        self._compute(plan)
        return self._sample(plan)

    def load(self, plan: StepPlan) -> None:
        """Take what comes from tiers; there are none here."""

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
            state_slot = plan.state_slots[plan.rows.index(row_index)] if self.states else -1
            saves = {save[1]: save[2] for save in plan.state_saves if plan.rows[save[0]] == row_index}
            assert all(1 <= number <= count for number in saves)
            for position in range(start, start + count):
                if self.states:
                    of_state = self.states[state_slot]
                    self.states[state_slot] = kv_of(of_state, token_ids[position])
                    if position - start + 1 in saves:
                        self.states[saves[position - start + 1]] = self.states[state_slot]
                for group, table in enumerate(row.tables):
                    if self.states:
                        previous = of_state
                    elif self.windows[group] == 1:  # the position before is out of sight
                        previous = kv_of_all(token_ids[:position])[-1] if position else 0
                    else:
                        previous = self.kv_at(row, position - 1, group) if position else 0
                    slot = table[position // self.size], position % self.size
                    assert slot not in written, "two rows write one slot"
                    written.add(slot)
                    self.memory[slot[0]][slot[1]] = kv_of(previous, token_ids[position]) ^ group << 62
            first += count
        for row_index, start, count in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            row = self.rows[row_index]
            token_ids = row.token_ids + drafts.get(row_index, [])
            for group, window in enumerate(self.windows):
                first = max(0, start - window + 1) if window else 0
                read = [self.kv_at(row, position, group) for position in range(first, start + count)]
                assert read == kv_of_all(token_ids[: start + count])[first:], "the context does not read back"

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
        self._pool(plan, result)
        for index, (_, targets) in plan.prompt_logprobs.items():
            start, row = plan.num_computed_tokens[index], self.rows[plan.rows[index]]
            assert targets == row.new_row.prompt_token_ids[start + 1 : start + 1 + plan.num_scheduled_tokens[index]]
            result.prompt_logprobs[index] = [
                TokenLogprobs([target], [-float(start + offset)], [1]) for offset, target in enumerate(targets)
            ]
        return result

    def _pool(self, plan: StepPlan, result: StepResult) -> None:
        assert plan.pool_rows == sorted(set(plan.pool_rows) - set(plan.sample_indices))
        for index in plan.pool_rows:
            row = self.rows[plan.rows[index]]
            end = plan.num_computed_tokens[index] + plan.num_scheduled_tokens[index]
            assert end == len(row.token_ids), "a vector is read after the prompt's last token"
            kv = self.kv_at(row, end - 1)
            if is_faulty(kv, row.new_row.seed):
                result.vector_errors[index] = "hidden states are not finite"
            else:
                result.vectors[index] = vector_of(kv)

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

    def kv_at(self, row: Row, position: int, group: int = 0) -> int:
        block = row.tables[group][position // self.size]
        assert block >= 0, "a block that was given back is read"
        return self.memory[block][position % self.size] ^ group << 62
