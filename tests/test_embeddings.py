"""`LLM.embed`: transformers' last hidden state, the same whatever the chunks, the cache and the neighbours."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quire import LLM, RequestError, SamplingParams
from quire.embeddings import EmbeddingRequestOutput
from quire.engine.engine import Engine
from quire.request import Request, Task
from tests.checkpoints import make_checkpoint, reference_model

Vectors = NDArray[np.float64]

TOLERANCE = 1e-5
SAMPLED = SamplingParams(temperature=1.0, seed=1, max_tokens=30, ignore_eos=True)


def make_prompts(count: int, longest: int = 90) -> list[list[int]]:
    """Among them one token, and one and two full blocks."""
    rng = random.Random(0)
    lengths = [1, 8, 16, longest, *(rng.randint(2, longest) for _ in range(count))][:count]
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


PROMPTS = make_prompts(10)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Vectors:
    """[prompt, hidden size]: the hidden state of the last token after the final norm."""
    model = reference_model(checkpoint).base_model
    with torch.inference_mode():
        states = [model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in PROMPTS]
    return torch.stack(states).double().numpy()


def make_llm(checkpoint: Path, **options: Any) -> LLM:
    return LLM(str(checkpoint), **{"block_size": 8, "num_blocks": 200, "max_num_seqs": 8, "threads": 1, **options})


def vectors(outputs: Sequence[EmbeddingRequestOutput]) -> Vectors:
    assert all(output.finished for output in outputs)
    return np.array([output.outputs.embedding for output in outputs])


def embed(llm: LLM, prompts: list[list[int]] = PROMPTS) -> Vectors:
    return vectors(llm.embed(prompts, normalize=False, use_tqdm=False))


def assert_same(found: Vectors, expected: Vectors) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 12},
        {"attention_backend": "sdpa", "block_size": 16},
        {"enable_prefix_caching": False},
        {"num_blocks": 16, "max_model_len": 100},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
    ],
    ids=["whole", "chunked", "sdpa", "no cache", "little memory", "drafts"],
)
def test_the_last_hidden_state_is_transformers(checkpoint: Path, expected: Vectors, options: dict[str, Any]) -> None:
    llm = make_llm(checkpoint, **options)
    found = embed(llm)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.99999
    assert_same(found, expected)
    # Again, from the cache; and the other way round.
    assert_same(embed(llm), expected)
    assert_same(embed(llm, PROMPTS[::-1]), expected[::-1])
    stats = llm.stats()
    assert (stats.num_used_blocks, stats.total_generated_tokens) == (0, 0)


def test_what_is_cached_is_found_by_either_task(checkpoint: Path, expected: Vectors) -> None:
    llm = make_llm(checkpoint)
    prompt = PROMPTS[3]
    llm.generate([prompt], SAMPLED, use_tqdm=False)
    (output,) = llm.embed([prompt], normalize=False, use_tqdm=False)
    assert output.num_cached_tokens == len(prompt) - 1
    assert_same(vectors([output]), expected[3:4])
    llm.reset_prefix_cache()
    llm.embed([prompt], use_tqdm=False)
    (sampled,) = llm.generate([prompt], SAMPLED, use_tqdm=False)
    assert sampled.num_cached_tokens == len(prompt) - 1


@pytest.mark.parametrize("num_blocks", [200, 24], ids=["roomy", "preempted"])
@pytest.mark.parametrize(
    "options", [{}, {"attention_backend": "sdpa", "block_size": 16, "async_scheduling": True}], ids=["cpu", "ahead"]
)
def test_neighbours_that_sample_change_nothing(
    checkpoint: Path, expected: Vectors, num_blocks: int, options: dict[str, Any]
) -> None:
    """Both tasks in the same steps; also if steps are planned before the result of the last one is known."""
    llm = make_llm(checkpoint, num_blocks=num_blocks, max_num_batched_tokens=24, max_model_len=160, **options)
    alone = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, SAMPLED, use_tqdm=False)]
    llm.reset_prefix_cache()
    outputs = run_mixed(llm._engine)
    tokens = [outputs[f"sample {number}"].outputs[0].token_ids for number in range(len(PROMPTS))]
    assert tokens == alone
    found = [np.frombuffer(outputs[f"embed {number}"].vector or b"", np.float32) for number in range(len(PROMPTS))]
    assert_same(np.array(found), expected)
    assert llm.stats().num_used_blocks == 0
    if num_blocks == 24 and not options:
        assert llm.stats().total_preemptions > 0


def run_mixed(engine: Engine) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for number, prompt in enumerate(PROMPTS):
        outputs[f"sample {number}"] = engine.add_request(f"sample {number}", prompt, SAMPLED)
        params = SamplingParams(detokenize=False)
        outputs[f"embed {number}"] = engine.add_request(f"embed {number}", prompt, params, task=Task.EMBED)
        engine.step()
    while engine.has_work:
        engine.step()
    return outputs


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The bundled model."""
    return LLM(num_blocks=100, max_num_seqs=8, threads=1, dtype="float32")


def test_names_and_lengths(llm: LLM) -> None:
    first, second = llm.embed(["ROMEO:", "JULIET:"])
    ids = llm.get_tokenizer().encode("ROMEO:")
    assert (first.prompt_token_ids, first.finished) == (ids, True)
    assert first.request_id != second.request_id
    assert first.outputs.hidden_size == len(second.outputs.embedding)
    assert math.hypot(*first.outputs.embedding) == pytest.approx(1.0)
    (raw,) = llm.embed(ids, normalize=False)
    length = math.hypot(*raw.outputs.embedding)
    assert length > 1.5
    assert [value / length for value in raw.outputs.embedding] == pytest.approx(first.outputs.embedding, abs=1e-6)
    assert llm.embed([]) == []


def test_bad_input_is_refused_with_the_numbers(llm: LLM) -> None:
    context = llm.memory_plan.max_model_len
    for prompts, message in (
        ([[5], []], "the prompt is empty"),
        (
            [[5], [5] * (context + 1)],
            f"has {context + 1} tokens, but .*maximum context length is {context} tokens: the prompt",
        ),
        ([[5, 10**6]], "prompt holds token 1000000"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.embed(prompts)
        assert llm.stats().num_waiting == 0
    whole = [number % 200 for number in range(context + 7)]
    (output,) = llm.embed([whole], truncate_prompt_tokens=-1)
    assert output.prompt_token_ids == whole[7:]
    assert llm.embed([whole[7:]])[0].outputs.embedding == pytest.approx(output.outputs.embedding, abs=1e-5)
    (output,) = llm.embed([whole], truncate_prompt_tokens=3)
    assert output.prompt_token_ids == whole[-3:]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 2}, "n is 2; an embedding is one vector of its prompt, so n must be 1"),
        ({"best_of": 3}, "n is 3;"),
        ({"temperature": 0.0, "beam_width": 1}, "beam_width is set; an embedding has no output tokens"),
        ({"logprobs": 1}, "logprobs is set"),
        ({"prompt_logprobs": 0}, "prompt_logprobs is set"),
    ],
)
def test_what_samples_or_reports_tokens_is_refused(llm: LLM, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm._engine.add_request("a", "ROMEO:", SamplingParams(**params), task=Task.EMBED)
    assert not llm._engine.has_work


def test_an_embedding_asks_for_no_tokens() -> None:
    with pytest.raises(RequestError, match="max_tokens is 16; an embedding samples no tokens, so it must be 0"):
        Request(request_id="a", prompt_token_ids=[1], params=SamplingParams(), task=Task.EMBED)


def test_a_prompt_that_fails_raises_and_its_neighbours_are_not_harmed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(checkpoint)
    runner = llm._engine._core._executor
    model = runner._model  # type: ignore[attr-defined]  # a ModelRunner
    call = type(model).__call__

    def broken(self: Any, input_ids: torch.Tensor, context: Any) -> torch.Tensor:
        hidden: torch.Tensor = call(self, input_ids, context)
        if (input_ids == 200).any():
            hidden[-1] = math.nan
        return hidden

    monkeypatch.setattr(type(model), "__call__", broken)
    with pytest.raises(RequestError, match="the model's hidden states are not finite"):
        llm.embed([[5, 6, 7], [200] * 20], use_tqdm=False)
    assert llm.embed([[5, 6, 7]], use_tqdm=False)[0].num_cached_tokens == 2
    (again,) = llm.generate([[200] * 20 + [5]], SamplingParams(max_tokens=1), use_tqdm=False)
    assert again.num_cached_tokens == 0
