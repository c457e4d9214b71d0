"""Beam search gives the tokens and scores of transformers, alone or beside other requests, at any size of memory."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from quire import LLM, BeamSearchParams, RequestError, SamplingParams
from quire.outputs import BeamSearchOutput
from quire.scheduler.scheduler import Scheduler
from quire.step import StepPlan
from tests.checkpoints import make_checkpoint, reference_model

NUM_TOKENS = 20
BLOCK_SIZE = 8
RNG = random.Random(3)
PROMPTS = [[RNG.randrange(256) for _ in range(length)] for length in (1, BLOCK_SIZE, 13)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama", dtype="float32")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> torch.nn.Module:
    return reference_model(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return make_llm(checkpoint)


def make_llm(checkpoint: Path, **options: int | bool) -> LLM:
    return LLM(
        str(checkpoint),
        dtype="float32",
        **{"block_size": BLOCK_SIZE, "max_num_seqs": 40, "num_blocks": 400, "threads": 1, **options},
    )


def expected_beams(
    oracle: torch.nn.Module, prompt: list[int], params: BeamSearchParams
) -> list[tuple[list[int], float]]:
    """Tokens and score of every beam that transformers returns."""
    enders = list(params.stop_token_ids)
    with torch.inference_mode():
        found = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=enders or None,
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    beams = []
    for sequence, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        tokens = sequence[len(prompt) :]
        end = next((place for place, token in enumerate(tokens) if token in enders), len(tokens) - 1)
        beams.append((tokens[: end + 1], score))
    return beams


def assert_beams(
    oracle: torch.nn.Module,
    prompts: Sequence[list[int]],
    outputs: Sequence[BeamSearchOutput],
    params: BeamSearchParams,
) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = expected_beams(oracle, prompt, params)
        assert [beam.tokens for beam in output.sequences] == [[*prompt, *tokens] for tokens, _ in expected]
        for beam, (tokens, score) in zip(output.sequences, expected, strict=True):
            assert beam.cum_logprob / len(tokens) ** params.length_penalty == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_tokens_and_scores(
    llm: LLM, oracle: torch.nn.Module, width: int, length_penalty: float, early_stopping: bool
) -> None:
    for enders in ((7,), (3, 9, 11, 200)):
        params = BeamSearchParams(
            beam_width=width,
            max_tokens=NUM_TOKENS,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            ignore_eos=True,
            stop_token_ids=enders,
        )
        assert_beams(oracle, PROMPTS, llm.beam_search(PROMPTS, params), params)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mistral"])
def test_other_families(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, family, dtype="float32")
    params = BeamSearchParams(beam_width=4, max_tokens=NUM_TOKENS, ignore_eos=True, stop_token_ids=(5,))
    assert_beams(reference_model(checkpoint), PROMPTS, make_llm(checkpoint).beam_search(PROMPTS, params), params)


@pytest.mark.parametrize("caching", [True, False])
def test_chunks_and_preemptions_change_nothing(
    checkpoint: Path, oracle: torch.nn.Module, caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams share so many blocks that memory rarely runs out, so every fifth step preempts a search."""
    schedule, numbers = Scheduler.schedule, itertools.count(1)

    def preempting_schedule(scheduler: Scheduler) -> StepPlan:
        if next(numbers) % 5 == 0 and scheduler._queues.running:
            scheduler._queues.preempt(scheduler._queues.running[-1])
        return schedule(scheduler)

    monkeypatch.setattr(Scheduler, "schedule", preempting_schedule)
    llm = make_llm(checkpoint, max_num_seqs=16, max_num_batched_tokens=24, enable_prefix_caching=caching)
    rng = random.Random(5)
    prompts = [[rng.randrange(256) for _ in range(rng.randrange(1, 40))] for _ in range(6)]
    params = BeamSearchParams(beam_width=4, max_tokens=NUM_TOKENS, ignore_eos=True, stop_token_ids=(5, 6))
    assert_beams(oracle, prompts, llm.beam_search(prompts, params), params)
    stats = llm.stats()
    assert stats.total_preemptions >= 5
    assert stats.num_used_blocks == 0


def test_mixed_decoding_gives_everybody_the_tokens_of_a_solo_run(checkpoint: Path) -> None:
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
        SamplingParams(seed=1, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2),
        SamplingParams(seed=2, n=3, top_p=0.9, max_tokens=NUM_TOKENS, ignore_eos=True),
        SamplingParams(beam_width=4, n=4, max_tokens=NUM_TOKENS, ignore_eos=True),
        SamplingParams(beam_width=3, n=1, max_tokens=NUM_TOKENS, ignore_eos=True, repetition_penalty=1.3, logprobs=3),
        SamplingParams(seed=3, temperature=0.7, top_k=5, min_p=0.05, max_tokens=NUM_TOKENS, prompt_logprobs=1),
    ]
    prompts = [PROMPTS[index % 3] for index in range(len(kinds))]
    together = make_llm(checkpoint).generate(prompts, kinds)
    for prompt, params, output in zip(prompts, kinds, together, strict=True):
        solo = make_llm(checkpoint).generate([prompt], params)[0]
        assert [sample.token_ids for sample in output.outputs] == [sample.token_ids for sample in solo.outputs]


def test_edits_apply_to_log_probabilities_as_in_transformers(llm: LLM, oracle: torch.nn.Module) -> None:
    prompt = PROMPTS[2]
    params = SamplingParams(
        beam_width=4,
        n=4,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        repetition_penalty=1.5,
        stop_token_ids=(5,),
        min_tokens=6,
    )
    with torch.inference_mode():
        found = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=6,
            repetition_penalty=1.5,
            eos_token_id=5,
            pad_token_id=0,
            do_sample=False,
        )
    expected = []
    for sequence in found.tolist():
        tokens = sequence[len(prompt) :]
        expected.append(tokens[: tokens.index(5) + 1] if 5 in tokens else tokens)
    assert [sample.token_ids for sample in llm.generate([prompt], params)[0].outputs] == expected


def test_log_probabilities_of_a_beam_add_up(llm: LLM) -> None:
    params = SamplingParams(beam_width=4, n=2, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    output = llm.generate([PROMPTS[2]], params)[0]
    assert len(output.prompt_logprobs or []) == len(PROMPTS[2])
    for sample in output.outputs:
        assert sample.logprobs is not None
        assert [next(iter(position)) for position in sample.logprobs] == sample.token_ids
        total = sum(position[token].logprob for position, token in zip(sample.logprobs, sample.token_ids, strict=True))
        assert sample.cumulative_logprob == pytest.approx(total, rel=1e-5)
        assert all(len(position) in (2, 3) for position in sample.logprobs)


def test_a_search_that_finds_too_few_sequences_says_so(llm: LLM) -> None:
    params = SamplingParams(beam_width=4, n=2, max_tokens=1, allowed_token_ids=(9,))
    first, second = llm.generate([PROMPTS[0]], params)[0].outputs
    assert first.token_ids == [9]
    assert (second.finish_reason, second.error) == (
        "error",
        "the beam search found 1 sequences: the tokens allowed leave no more",
    )


def test_one_beam_is_greedy(llm: LLM) -> None:
    greedy = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True))
    searched = llm.generate(PROMPTS, SamplingParams(beam_width=1, max_tokens=NUM_TOKENS, ignore_eos=True))
    assert [o.outputs[0].token_ids for o in searched] == [o.outputs[0].token_ids for o in greedy]


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"beam_width": 65}, "beam_width"),
        ({"beam_width": 2, "n": 3}, "n"),
        ({"beam_width": 2, "temperature": 0.5}, "beam_width"),
        ({"beam_width": 2, "top_p": 0.5}, "beam_width"),
        ({"beam_width": 2, "stop": "x"}, "stop"),
        ({"beam_width": 2, "early_stopping": "soon"}, "early_stopping"),
        ({"beam_width": 2, "length_penalty": 11}, "length_penalty"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert caught.value.param == param
