"""Speculation in the whole engine: drafts change the number of steps and no bit of the outputs."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams, StructuredOutputsParams, speculative_config
from quire.outputs import RequestOutput
from quire.scheduler.acceptance import Draft
from quire.scheduler.proposers import PROPOSERS
from quire.scheduler.step_times import StepCurve, StepTimes
from quire.speculative_config import SpeculativeConfig
from tests.checkpoints import make_checkpoint

NGRAM = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 1}
OPTIONS: dict[str, Any] = {
    "num_blocks": 400,
    "max_num_seqs": 16,
    "threads": 1,
    "dtype": "float32",
    "deterministic": True,
    "block_size": 4,
}
SCHEMA = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 3, "maxItems": 6}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "logprobs": 2},
    "sampled": {"temperature": 0.6, "seed": 1, "logprobs": 1},
    "top_p": {"temperature": 0.7, "seed": 2, "top_p": 0.8, "top_k": 30, "logprobs": 0},
    "processed": {"temperature": 0.6, "seed": 3, "logprobs": 2, "logprobs_mode": "processed_logprobs"},
    "penalties": {"temperature": 0.4, "seed": 4, "repetition_penalty": 1.05, "frequency_penalty": 0.02, "logprobs": 1},
    "bias": {"temperature": 0.5, "seed": 5, "logit_bias": {40: 1.0}, "bad_words": ["the"], "min_tokens": 20},
    "n": {"temperature": 0.6, "seed": 6, "n": 3, "prompt_logprobs": 1},
    "stop": {"temperature": 0.0, "stop": ["O"], "stop_token_ids": [10]},
    "schema": {"temperature": 0.5, "seed": 7, "structured_outputs": StructuredOutputsParams(json=SCHEMA)},
    "schema and logprobs": {
        "temperature": 0.0,
        "logprobs": 1,
        "structured_outputs": StructuredOutputsParams(json=SCHEMA),
    },
}
"""Ways of sampling → parameters; the end of a text counts only where it is of interest."""
SENTENCES = "ROMEO:\nWhat say you?\n\nJULIET:\nI say no.\n\n"


def make_params(name: str) -> SamplingParams:
    ignore_eos = name in ("greedy", "sampled", "n")
    return SamplingParams(max_tokens=40, ignore_eos=ignore_eos, **PARAMS[name])


def what_came_of(output: RequestOutput) -> Any:
    return [
        (sample.token_ids, sample.text, sample.logprobs, sample.finish_reason, sample.stop_reason)
        for sample in output.outputs
    ], output.prompt_logprobs


@pytest.fixture
def free_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """All drafts are computed: every step appears to take the same time."""
    monkeypatch.setattr(StepTimes, "curve", lambda *_: StepCurve([(1, 1.0)]))


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with LLM(**OPTIONS) as llm:
        yield llm


@pytest.mark.usefixtures("free_steps")
@pytest.mark.parametrize("options", [{}, {"num_blocks": 45, "max_model_len": 160}], ids=["roomy", "preempting"])
def test_the_same_bits_in_fewer_steps(plain: LLM, options: dict[str, Any]) -> None:
    prompts = [SENTENCES * 2 + SENTENCES[: 3 * number] for number in range(len(PARAMS))]
    params = [make_params(name) for name in PARAMS]
    expected = plain.generate(prompts, params)
    with LLM(**{**OPTIONS, **options}, speculative_config=NGRAM) as llm:
        found = llm.generate(prompts, params)
        for name, one, other in zip(PARAMS, found, expected, strict=True):
            assert what_came_of(one) == what_came_of(other), name
        stats = llm.stats()
        assert stats.num_used_blocks == 0
        assert stats.total_draft_tokens > stats.total_accepted_tokens > 30
        metrics = [output.metrics for output in found if output.metrics is not None]
        assert sum(each.num_draft_tokens for each in metrics) == stats.total_draft_tokens
        assert sum(each.num_accepted_tokens for each in metrics) == stats.total_accepted_tokens
        assert (stats.total_preemptions > 0) == bool(options)


@pytest.mark.usefixtures("free_steps")
def test_a_prompt_that_reuses_blocks_filled_by_drafts(tmp_path: Path) -> None:
    """Cached blocks of a sequence with drafts equal those of its tokens."""
    checkpoint = make_checkpoint(tmp_path, "llama")
    rng = random.Random(0)
    prompt = [rng.randrange(256) for _ in range(20)] * 2
    greedy = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, logprobs=0)
    with LLM(str(checkpoint), **OPTIONS) as plain, LLM(str(checkpoint), **OPTIONS, speculative_config=NGRAM) as llm:
        (first,) = plain.generate([prompt], greedy)
        assert what_came_of(llm.generate([prompt], greedy)[0]) == what_came_of(first)
        assert llm.stats().total_accepted_tokens > 10
        longer = [prompt + first.outputs[0].token_ids[:cut] + [7] for cut in range(0, 100, 9)]
        plain.reset_prefix_cache()
        for one, other in zip(llm.generate(longer, greedy), plain.generate(longer, greedy), strict=True):
            assert one.num_cached_tokens >= len(one.prompt_token_ids) - OPTIONS["block_size"] - 1
            assert what_came_of(one) == what_came_of(other)


@pytest.mark.usefixtures("free_steps")
def test_who_gets_no_drafts() -> None:
    def keep(token_ids: Any, logits: Any) -> Any:
        return logits

    with LLM(**OPTIONS, speculative_config=json.dumps(NGRAM)) as llm:
        llm.generate([SENTENCES * 2], SamplingParams(temperature=0.0, max_tokens=20, logits_processors=[keep]))
        llm.generate([SENTENCES * 2], SamplingParams(temperature=0.0, max_tokens=20, beam_width=2))
        assert llm.stats().total_drafts == 0
        llm.generate([SENTENCES * 2], SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))
        assert llm.stats().total_drafts > 0


@pytest.mark.usefixtures("free_steps")
def test_another_proposer_is_a_row(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows what comes, but for every fifth draft."""
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=60, ignore_eos=True)
    (expected,) = plain.generate([SENTENCES], params)
    whole = [*expected.prompt_token_ids, *expected.outputs[0].token_ids]
    num_calls = 0

    class Oracle:
        def propose(self, token_ids: list[int], max_tokens: int) -> Draft:
            nonlocal num_calls
            num_calls += 1
            draft = whole[len(token_ids) : len(token_ids) + max_tokens]
            return Draft(draft if num_calls % 5 else [token ^ 1 for token in draft])

    def make(speculative_config: SpeculativeConfig) -> Oracle:
        assert speculative_config.num_speculative_tokens == 4
        return Oracle()

    monkeypatch.setitem(PROPOSERS, "oracle", make)
    monkeypatch.setattr(speculative_config, "SPECULATIVE_METHODS", ("ngram", "oracle"))
    with LLM(**OPTIONS, speculative_config={"method": "oracle", "num_speculative_tokens": 4}) as llm:
        (found,) = llm.generate([SENTENCES], params)
        assert what_came_of(found) == what_came_of(expected)
        assert llm.stats().total_draft_tokens > llm.stats().total_accepted_tokens > 20
