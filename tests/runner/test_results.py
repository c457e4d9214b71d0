"""What samples mean for their sequences, without a model: drafts, failures, placeholders, prompt log-probabilities."""

from typing import Any

import numpy as np
import pytest
import torch

from quire.runner.request_rows import RequestRows
from quire.runner.results import PendingStep, PromptLogprobs, StepResults, fetch_vectors
from quire.runner.sampling_metadata import SamplingMetadata, make_sampling_metadata
from quire.runner.step_inputs import StepInputBuilder
from quire.sampling.device_sampler import DeviceSampler
from quire.sampling.sampler import NO_TOKEN, SampleResult
from quire.sampling.state import PLACEHOLDER_TOKEN, SamplingState
from quire.sampling_params import SamplingParams
from quire.step import BeamCandidates, NewRow, StepPlan, StepResult, TokenLogprobs

VOCAB_SIZE = 20
CPU = torch.device("cpu")
RESULTS = StepResults(max_model_len=100)


class FakeGrammar:
    """Allows every token, forces `forced` by the number of tokens so far, and is complete after `num_tokens`."""

    def __init__(self, forced: dict[int, list[int]], num_tokens: int = 100) -> None:
        self.forced, self.num_tokens, self.taken = forced, num_tokens, list[int]()

    def append(self, token_id: int) -> None:
        self.taken.append(token_id)

    def take_forced(self, limit: int) -> list[int]:
        forced = self.forced.get(len(self.taken), [])[:limit]
        self.taken += forced
        return forced

    @property
    def has_choice(self) -> bool:
        return not self.forced.get(len(self.taken)) and not self.complete

    @property
    def complete(self) -> bool:
        return len(self.taken) >= self.num_tokens

    def allows(self, token_id: int) -> bool:
        return True

    def fork(self) -> "FakeGrammar":
        child = FakeGrammar(self.forced, self.num_tokens)
        child.taken = self.taken.copy()
        return child


def make_state(grammar: Any = None, **params: Any) -> SamplingState:
    return SamplingState(SamplingParams(**params), [1], [], 0, 0, (), VOCAB_SIZE, grammar)


def make_step(states: list[SamplingState], drafts: dict[int, list[int]]) -> tuple[StepPlan, SamplingMetadata]:
    """Every sequence decodes; some have drafts."""
    counts = [1 + len(drafts.get(index, ())) for index in range(len(states))]
    rows = list(range(len(states)))
    plan = StepPlan(
        rows=rows,
        num_computed_tokens=[5] * len(rows),
        num_scheduled_tokens=counts,
        token_ids=[0] * sum(counts),
        sample_rows=rows,
        sample_indices=rows,
        drafts=drafts,
    )
    return plan, make_sampling_metadata(plan, states, 1)


def sampled(token_ids: list[int], errors: dict[int, str] | None = None) -> SampleResult:
    errors = errors or {}
    result = SampleResult(token_ids, [None] * len(token_ids), [errors.get(i) for i in range(len(token_ids))], {})
    for index in errors:
        result.token_ids[index] = NO_TOKEN
    return result


def outputs(states: list[SamplingState]) -> list[list[int]]:
    return [state.output_token_ids for state in states]


@pytest.mark.parametrize("params", [{}, {"presence_penalty": 0.5}], ids=["stateless", "with a memory"])
def test_each_sequence_gets_its_token(params: dict[str, Any]) -> None:
    states, result = [make_state(**params) for _ in range(3)], StepResult()
    plan, sampling = make_step(states, {})
    assert (sampling.outputs is None) == bool(params)
    RESULTS.accept(plan, sampling, sampled([7, 8, 9]), result)
    assert outputs(states) == [[7], [8], [9]]
    assert result.token_ids == [7, 8, 9]
    assert result.extra_token_ids == {}


def test_a_failed_sequence_gets_no_token_and_others_do() -> None:
    states, result = [make_state() for _ in range(3)], StepResult()
    plan, sampling = make_step(states, {})
    RESULTS.accept(plan, sampling, sampled([7, 8, 9], {1: "NaN"}), result)
    assert outputs(states) == [[7], [], [9]]
    assert result.errors == [None, "NaN", None]


@pytest.mark.parametrize(
    ("tokens", "errors", "expected"),
    [
        ([3, 4, 5, 6], {}, [3, 4, 5, 6]),  # all of the draft 3, 4, 5 and the sample after it
        ([3, 4, 9, 6], {}, [3, 4, 9]),
        ([8, 4, 5, 6], {}, [8]),
        ([3, 4, 5, 6], {2: "NaN"}, [3, 4]),  # it fails again in the next step, as that sequence's own
        ([3, 4, 5, 6], {0: "NaN"}, []),
    ],
)
def test_a_draft_is_accepted_as_far_as_it_was_sampled(
    tokens: list[int], errors: dict[int, str], expected: list[int]
) -> None:
    states, result = [make_state(), make_state(presence_penalty=1.0)], StepResult()
    plan, sampling = make_step(states, {1: [3, 4, 5]})
    assert sampling.offsets == [0, 1, 5]
    RESULTS.accept(plan, sampling, sampled([7, *tokens], {1 + index: text for index, text in errors.items()}), result)
    assert outputs(states) == [[7], expected]
    assert result.token_ids == [7, expected[0] if expected else NO_TOKEN]
    assert result.extra_token_ids == ({1: expected[1:]} if len(expected) > 1 else {})
    assert (result.errors[1] is None) == bool(expected)


def test_log_probabilities_of_accepted_tokens() -> None:
    states, result = [make_state(logprobs=0)], StepResult()
    plan, sampling = make_step(states, {0: [3, 4]})
    found = sampled([3, 9, 6])
    found.logprobs = [TokenLogprobs([token], [-float(token)], [1]) for token in found.token_ids]
    RESULTS.accept(plan, sampling, found, result)
    assert [entry and entry.token_ids for entry in result.logprobs] == [[3]]
    assert [entry.token_ids for entry in result.extra_logprobs[0]] == [[9]]


def test_forced_tokens_follow_a_sample() -> None:
    """As many as the request may have; and a draft ends where the next token is forced."""
    grammars = [FakeGrammar({1: [11, 12]}), FakeGrammar({1: [11, 12, 13]}), FakeGrammar({2: [13]}, num_tokens=3)]
    states = [make_state(grammar, max_tokens=limit) for grammar, limit in zip(grammars, (9, 3, 9), strict=True)]
    result = StepResult()
    plan, sampling = make_step(states, {2: [4, 5]})
    RESULTS.accept(plan, sampling, sampled([7, 8, 4, 5, 6]), result)
    assert outputs(states) == [[7, 11, 12], [8, 11, 12], [4, 5, 13]]
    assert [grammar.taken for grammar in grammars] == outputs(states)
    assert result.extra_token_ids == {0: [11, 12], 1: [11, 12], 2: [5, 13]}
    assert result.terminated == [2]


def test_a_beam_gets_candidates_and_no_token() -> None:
    states, result = [make_state(beam_width=2), make_state()], StepResult()
    plan, sampling = make_step(states, {})
    found = sampled([NO_TOKEN, 7])
    found.candidates[0] = BeamCandidates([5, 6], [-1.0, -2.0], [])
    RESULTS.accept(plan, sampling, found, result)
    assert outputs(states) == [[], [7]]
    assert result.candidates == found.candidates


def device_samples(token_ids: list[int], max_logits: list[float]) -> torch.Tensor:
    bits = torch.tensor(max_logits, dtype=torch.float32).view(torch.int32)
    return torch.stack((torch.tensor(token_ids, dtype=torch.int32), bits))


def test_placeholders_stand_until_the_samples_are_read() -> None:
    states, result = [make_state() for _ in range(2)], StepResult()
    plan, sampling = make_step(states, {})
    samples = device_samples([7, 8, 99], [1.0, float("nan"), 0.0])  # and one of padding
    first = PendingStep(result, [RESULTS.accept_later(plan, sampling, samples, result)])
    samples.fill_(0)  # the next step overwrites them
    assert outputs(states) == [[PLACEHOLDER_TOKEN]] * 2
    following = StepResult()
    second = PendingStep(following, [RESULTS.accept_later(plan, sampling, device_samples([5, 6], [1, 1]), following)])
    assert not first.ready
    assert first.result() is result
    assert first.ready
    assert outputs(states) == [[7, PLACEHOLDER_TOKEN], [NO_TOKEN, PLACEHOLDER_TOKEN]]
    assert result.token_ids == [7, NO_TOKEN]
    assert [error is None for error in result.errors] == [True, False]
    second.result()
    assert outputs(states) == [[7, 5], [NO_TOKEN, 6]]


def test_drafts_leave_no_placeholder() -> None:
    states, result = [make_state()], StepResult()
    plan, sampling = make_step(states, {0: [3]})
    finish = RESULTS.accept_later(plan, sampling, device_samples([3, 4], [1.0, 1.0]), result)
    assert outputs(states) == [[]]
    finish()
    assert outputs(states) == [[3, 4]]
    assert result.extra_token_ids == {0: [4]}


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("num_selected", [40, 60])
def test_log_probabilities_of_a_prompt(on_device: bool, num_selected: int) -> None:
    """A few positions at a time, of hidden states that begin where the sequence's do."""
    rows = RequestRows(max_num_seqs=2, max_blocks=16, vocab_size=VOCAB_SIZE)
    rows.apply(StepPlan(new_rows=[NewRow(row, SamplingParams(), [1], [], 0, 0, ()) for row in range(2)]))
    targets = [(7 * place) % VOCAB_SIZE for place in range(num_selected)]
    plan = StepPlan(
        rows=[0, 1],
        num_computed_tokens=[0, 0],
        num_scheduled_tokens=[50, num_selected],
        token_ids=[1] * (50 + num_selected),
        prompt_logprobs={1: (2, targets)},
    )
    builder = StepInputBuilder(rows, 16, CPU)
    step = builder.lay_out(plan)
    sent = builder.send(step, {})
    assert sent.selection is not None
    hidden = torch.randn(num_selected, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    taken: list[int] = []

    def compute_logits(part: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
        taken.append(len(part))
        assert torch.equal(part, hidden[sent.hidden_indices(tokens)])
        return 2 * part

    sampler = DeviceSampler(VOCAB_SIZE) if on_device else None
    result = StepResult()
    prompts = PromptLogprobs(compute_logits, VOCAB_SIZE, logprobs_memory=4000, device_sampler=sampler)
    finishes = prompts.compute(step, sent, hidden, result)
    assert bool(finishes) == on_device
    for finish in finishes:
        finish()
    assert len(taken) > 2
    assert sum(taken) == num_selected
    expected = (2 * hidden).log_softmax(1).numpy()
    entries = result.prompt_logprobs[1]
    assert [entry.token_ids[0] for entry in entries] == targets
    for place, entry in enumerate(entries):
        np.testing.assert_allclose(entry.logprobs, expected[place, entry.token_ids], atol=1e-5)
        assert entry.ranks == [1 + int((expected[place] > expected[place, targets[place]]).sum()), 1, 2]


# -- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_unused", [50, 3], ids=["selected", "all tokens"])
def test_vectors_are_the_last_hidden_states_of_their_rows(num_unused: int) -> None:
    """Rows 1 and 3 are asked for; row 3's vector is not finite. Later writes to the hidden states change nothing."""
    rows = RequestRows(max_num_seqs=4, max_blocks=16, vocab_size=VOCAB_SIZE)
    rows.apply(StepPlan(new_rows=[NewRow(row, SamplingParams(), [1], [], 0, 0, ()) for row in range(4)]))
    counts = [num_unused, 2, 1, 1]
    plan = StepPlan(
        rows=[0, 1, 2, 3],
        num_computed_tokens=[0] * 4,
        num_scheduled_tokens=counts,
        token_ids=[1] * sum(counts),
        sample_indices=[2],
        sample_rows=[2],
        pool_rows=[1, 3],
    )
    builder = StepInputBuilder(rows, 16, CPU)
    step = builder.lay_out(plan)
    sent = builder.send(step, {})
    assert (sent.selection is None) == (num_unused == 3)
    of_tokens = torch.randn(sum(counts), 5, dtype=torch.bfloat16)
    of_tokens[-1, 2] = torch.nan
    hidden = of_tokens if sent.selection is None else of_tokens[torch.from_numpy(sent.selection.tokens)]
    expected = of_tokens[num_unused + 1].float().numpy().tobytes()
    result = StepResult()
    finish = fetch_vectors(step, sent, hidden, result)
    hidden.zero_()
    finish()
    assert result.vectors == {1: expected}
    assert result.vector_errors == {3: "the model's hidden states are not finite"}
