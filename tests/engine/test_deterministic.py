"""`deterministic=True`: a request's tokens and log-probabilities are the same bits however it is computed."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.outputs import RequestOutput
from tests.checkpoints import make_checkpoint

NUM_TOKENS = 8
LENGTHS = [1, 16, 40, 1100, 7, 90, 33, 70, 12, 64, 3, 50, 25, 80, 48, 10, 77]
"""Of 17 prompts; the longest passes from one part of its keys to the next."""
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.0, "seed": 1, "logprobs": 0},
    {"temperature": 0.8, "seed": 2, "top_p": 0.9, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 1.1, "seed": 3, "top_k": 20, "min_p": 0.01, "logprobs": 1, "logprobs_mode": "processed_logprobs"},
    {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "logprobs": 5, "prompt_logprobs": 0},
    {"temperature": 1.0, "seed": 4, "n": 2, "logprobs": 1, "logit_bias": {5: 2.0}},
]


def make_prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(length)] for length in LENGTHS]


PROMPTS = make_prompts()
REQUESTS = [
    SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **PARAMS[number % len(PARAMS)])
    for number in range(len(PROMPTS))
]


Weights = dict[str, str]
"""The options that say how weights are stored."""


def make_llm(checkpoint: Path, weights: Weights, **options: Any) -> LLM:
    return LLM(
        str(checkpoint),
        deterministic=True,
        threads=2,  # with one, attention never splits keys by load
        **{"dtype": "float32", "num_blocks": 400, "max_num_seqs": 32, **weights, **options},
    )


def generate(llm: LLM, numbers: list[int]) -> dict[int, Any]:
    outputs = llm.generate([PROMPTS[number] for number in numbers], [REQUESTS[number] for number in numbers])
    return {number: what_came_of(output) for number, output in zip(numbers, outputs, strict=True)}


def what_came_of(output: RequestOutput) -> Any:
    """The part of the outputs that must be bit-identical."""
    assert all(len(sample.token_ids) == NUM_TOKENS for sample in output.outputs)
    return [(sample.token_ids, sample.logprobs) for sample in output.outputs], output.prompt_logprobs


ALL = list(range(len(PROMPTS)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama", max_position_embeddings=2048)


@pytest.fixture(
    scope="module",
    params=[{}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"quantization": "int4"}],
    ids=["float32", "bfloat16", "int8", "int4"],
)
def weights(request: pytest.FixtureRequest) -> Weights:
    weights: Weights = request.param
    return weights


@pytest.fixture(scope="module")
def alone(checkpoint: Path, weights: Weights) -> Iterator[dict[int, Any]]:
    """Each request alone, without a cached prefix."""
    with make_llm(checkpoint, weights, enable_prefix_caching=False) as llm:
        yield {number: generate(llm, [number])[number] for number in ALL}


def test_in_a_batch_and_again_from_the_prefix_cache(checkpoint: Path, weights: Weights, alone: dict[int, Any]) -> None:
    with make_llm(checkpoint, weights) as llm:
        assert generate(llm, ALL) == alone
        assert generate(llm, ALL[::-1]) == alone
        assert llm.stats().total_prefix_hits > 1000


def test_in_chunks_of_seven_tokens(checkpoint: Path, weights: Weights, alone: dict[int, Any]) -> None:
    with make_llm(checkpoint, weights, max_num_batched_tokens=7, max_num_seqs=7) as llm:
        assert generate(llm, ALL) == alone


@pytest.mark.parametrize("caching", [True, False])
def test_preempted(checkpoint: Path, weights: Weights, alone: dict[int, Any], caching: bool) -> None:
    numbers = [number for number in ALL if LENGTHS[number] < 100]
    with make_llm(checkpoint, weights, num_blocks=14, max_model_len=200, enable_prefix_caching=caching) as llm:
        assert generate(llm, numbers) == {number: alone[number] for number in numbers}
        assert llm.stats().total_preemptions > 0


def test_resumed_from_disk(checkpoint: Path, weights: Weights, alone: dict[int, Any], tmp_path: Path) -> None:
    for _ in range(2):
        with make_llm(checkpoint, weights, disk_cache=str(tmp_path)) as llm:
            assert generate(llm, ALL) == alone
    assert llm.stats().tiers["disk"].total_hits > 1000


def test_experts(tmp_path: Path) -> None:
    """Each expert computes the tokens of a whole batch in one product."""
    folder = make_checkpoint(tmp_path, "mixtral", num_local_experts=5, num_experts_per_tok=3)
    numbers = [number for number in ALL if LENGTHS[number] < 100]
    with make_llm(folder, {}) as llm:
        expected = {number: generate(llm, [number])[number] for number in numbers}
        assert generate(llm, numbers) == expected
    with make_llm(folder, {}, max_num_batched_tokens=7, max_num_seqs=7, enable_prefix_caching=False) as llm:
        assert generate(llm, numbers) == expected
