"""Planning a step while the one before it runs changes no token, with any parameters; nor does a lack of memory."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from quire.runner.model_runner import ModelRunner, PendingStep
from quire.step import StepPlan
from tests.checkpoints import make_checkpoint

PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.3, "seed": 1},
    "top_k": {"temperature": 1.1, "top_k": 12, "seed": 2},
    "top_p": {"temperature": 1.5, "top_p": 0.7, "min_p": 0.01, "seed": 3},
    "both": {"temperature": 1.5, "top_k": 50, "top_p": 0.8, "seed": 4},
    "n": {"temperature": 1.2, "n": 3, "seed": 5},
    "penalties": {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 6},
    "logprobs": {"temperature": 1.0, "logprobs": 3, "seed": 7},
    "prompt_logprobs": {"temperature": 1.0, "prompt_logprobs": 1, "seed": 8},
    "beams": {"temperature": 0.0, "beam_width": 3},
    "min_tokens": {"temperature": 1.4, "min_tokens": 9, "seed": 9},
    "stop_tokens": {"temperature": 1.4, "stop_token_ids": list(range(60)), "seed": 10},
    "bias": {"temperature": 1.0, "logit_bias": {7: 5.0}, "seed": 11},
    "bad_words": {"temperature": 1.0, "bad_words": ["a"], "seed": 12},
    "stop": {"temperature": 1.4, "stop": ["e", "3"], "seed": 13},
    "grammar": {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(regex="[a-e]{1,30}"), "seed": 14},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3")


def make_llm(checkpoint: Path, **options: Any) -> LLM:
    defaults = {"attention_backend": "sdpa", "block_size": 16, "num_blocks": 200, "max_num_seqs": 16, "threads": 1}
    return LLM(str(checkpoint), **{**defaults, **options})


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in PARAMS for _ in range(2)]
    kinds = [options for options in PARAMS.values() for _ in range(2)]
    return prompts, [SamplingParams(max_tokens=rng.randint(8, 40), **options) for options in kinds]


def seen(outputs: list[RequestOutput]) -> list[Any]:
    return [
        [(sample.token_ids, sample.text, sample.finish_reason, sample.stop_reason) for sample in output.outputs]
        for output in outputs
    ]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Any]:
    """Without overlap, with the sampler of the host."""
    return seen(make_llm(checkpoint, async_scheduling=False).generate(*requests()))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_blocks": 24, "max_model_len": 200}, {"max_num_batched_tokens": 20}, {"enable_prefix_caching": False}],
    ids=["roomy", "preempted", "chunked", "no cache"],
)
def test_no_token_changes(checkpoint: Path, expected: list[Any], options: dict[str, Any]) -> None:
    llm = make_llm(checkpoint, async_scheduling=True, **options)
    assert seen(llm.generate(*requests())) == expected
    assert llm.stats().num_used_blocks == 0
    if "num_blocks" in options:
        assert llm.stats().total_preemptions > 0


def test_sampling_only_steps_run_ahead(checkpoint: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """If a step only samples, the next one is launched before its result is read."""
    order: list[str] = []
    launch, result = ModelRunner.launch, PendingStep.result

    def noted_launch(self: ModelRunner, plan: StepPlan) -> PendingStep:
        order.append("launch")
        return launch(self, plan)

    def noted_result(self: PendingStep) -> Any:
        if not self.ready:
            order.append("result")
        return result(self)

    monkeypatch.setattr(ModelRunner, "launch", noted_launch)
    monkeypatch.setattr(PendingStep, "result", noted_result)
    prompts, params = requests()
    chosen = [
        place
        for place, kind in enumerate(kind for kind in PARAMS for _ in range(2))
        if kind in ("greedy", "both", "logprobs")
    ]
    llm = make_llm(checkpoint, async_scheduling=True)
    found = seen(llm.generate([prompts[place] for place in chosen], [params[place] for place in chosen]))
    assert found == [expected[place] for place in chosen]
    assert order[:5] == ["launch", "launch", "result", "launch", "result"]


def test_the_device_reports_what_the_host_would(checkpoint: Path) -> None:
    """Log-probabilities of samples and prompts, the latter a few positions at a time."""
    kinds: list[dict[str, Any]] = [
        {"logprobs": 4, "prompt_logprobs": 2},
        {"logprobs": 0, "top_k": 30, "temperature": 1.2, "seed": 1},
        {"temperature": 0.0, "prompt_logprobs": 20},
    ]
    prompts = [[(7 * place + kind) % 256 for place in range(20 + 30 * kind)] for kind in range(3)]
    params = [SamplingParams(max_tokens=9, **kind) for kind in kinds]

    def reported(**options: Any) -> list[Any]:
        outputs = make_llm(checkpoint, max_num_batched_tokens=32, logprobs_memory="32KiB", **options).generate(
            prompts, params
        )
        return [
            {token: (entry.logprob, entry.rank) for token, entry in position.items()}
            for output in outputs
            for position in [*(output.prompt_logprobs or ()), *(output.outputs[0].logprobs or ())]
            if position is not None
        ]

    expected, found = reported(async_scheduling=False), reported(async_scheduling=True)
    assert len(expected) > 100
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for token, (logprob, rank) in one.items():
            assert other[token] == (pytest.approx(logprob, abs=5e-6), rank)


def test_prompt_logprobs_beside_a_sample_of_the_host(checkpoint: Path) -> None:
    """Pending prompt log-probabilities do not let a sequence continue with a token that the device did not sample."""
    prompts = [[5, 6, 7], [(7 * place) % 256 for place in range(40)]]
    params = [
        SamplingParams(max_tokens=30, temperature=0.9, presence_penalty=0.5, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=10, temperature=0.0, prompt_logprobs=1, ignore_eos=True),
    ]
    found, expected = (
        seen(make_llm(checkpoint, async_scheduling=overlaps, max_num_batched_tokens=16).generate(prompts, params))
        for overlaps in (True, False)
    )
    assert found == expected


def test_a_device_out_of_memory(checkpoint: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    launch = ModelRunner._compute
    failures = []

    def failing(self: ModelRunner, plan: StepPlan, result: Any) -> Any:
        if plan.num_tokens > 1 and rng.random() < 0.1:
            failures.append(plan.num_tokens)
            raise rng.choice(
                [
                    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
                    RuntimeError("Triton Error [CUDA]: out of memory"),
                    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                ]
            )
        return launch(self, plan, result)

    monkeypatch.setattr(ModelRunner, "_compute", failing)
    llm = make_llm(checkpoint, async_scheduling=True)
    assert seen(llm.generate(*requests())) == expected
    assert len(failures) > 3
    assert llm.stats().total_preemptions >= len(failures)
    assert llm.stats().num_used_blocks == 0
