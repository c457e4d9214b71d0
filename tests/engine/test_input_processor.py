"""User input becomes a Request with every value resolved, or an error that names the field."""

from typing import Any

import pytest

from quire.engine.checkpoint import bundled_folder
from quire.engine.input_processor import InputProcessor
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.model_config import ModelConfig
from quire.request import Request, Task
from quire.sampling_params import SamplingParams

MODEL = ModelConfig.from_folder(bundled_folder())
TOKENIZER = Tokenizer.from_folder(bundled_folder())


def make_request(prompt: Any, tokenizer: Tokenizer | None = TOKENIZER, seed: int = 0, **params: Any) -> Request:
    inputs = InputProcessor(MODEL, tokenizer, max_model_len=100, max_logprobs=5, seed=seed, clock=lambda: 7.0)
    return inputs.make_request("id", prompt, SamplingParams(**params))[0]


def test_text_ids_and_mappings_are_the_same_prompt() -> None:
    ids = TOKENIZER.encode("ROMEO:")
    for prompt in ("ROMEO:", ids, tuple(ids), {"prompt": "ROMEO:"}, {"prompt_token_ids": ids}):
        assert make_request(prompt).prompt_token_ids == ids


def test_everything_is_resolved() -> None:
    request = make_request([5, 6, 7], max_tokens=None)
    assert request.max_tokens == 97
    assert request.eos_token_ids == MODEL.eos_token_ids != ()
    assert request.arrival_time == 7.0
    assert make_request([5], ignore_eos=True).eos_token_ids == ()
    assert make_request([5], seed=1).seed != make_request([5], seed=2).seed
    inputs = InputProcessor(MODEL, None, max_model_len=100, max_logprobs=5, seed=0)
    assert inputs.make_request("a", [5], SamplingParams(seed=-3))[0].seed == 2**64 - 3


def test_truncation_keeps_the_last_tokens() -> None:
    ids = list(range(10, 160))
    assert make_request(ids, truncate_prompt_tokens=4).prompt_token_ids == ids[-4:]
    assert make_request(ids, truncate_prompt_tokens=-1, max_tokens=30).prompt_token_ids == ids[-70:]


def test_bad_words_are_tokenised_with_and_without_a_space() -> None:
    words = make_request([5], bad_words=["Romeo"]).params.bad_words_token_ids
    assert set(words) == {tuple(TOKENIZER.encode(text, add_special_tokens=False)) for text in ("Romeo", " Romeo")}


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (
            [1] * 100,
            {},
            r"the prompt has 100 tokens, but .*maximum context length is 100 tokens, output included",
        ),
        (
            [1] * 300,
            {"truncate_prompt_tokens": 200},
            r"the prompt has 200 tokens, but .*maximum context length is 100 tokens",
        ),
        ([], {}, r"the prompt is empty: it must hold at least one token"),
        ([1, 10**6], {}, r"prompt holds token 1000000; the model's vocabulary ends at \d+"),
        ([-1], {}, r"prompt holds token -1"),
        ([1], {"stop_token_ids": [10**6]}, r"stop_token_ids holds token 1000000"),
        ([1], {"allowed_token_ids": [10**6]}, r"allowed_token_ids holds token 1000000"),
        ([1], {"logit_bias": {10**6: 1.0}}, r"logit_bias holds token 1000000"),
        ([1], {"logprobs": 6}, r"logprobs is 6; this engine gives at most 5 \(max_logprobs\)"),
        ([1], {"prompt_logprobs": -1}, r"prompt_logprobs is -1; this engine gives at most 5"),
        ([1, "x"], {}, r"a text or a list of token ids"),
        ({"text": "x"}, {}, r"needs the key prompt or prompt_token_ids; it has \['text'\]"),
    ],
)
def test_refusals(prompt: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_request(prompt, **params)


def test_text_needs_a_tokenizer() -> None:
    assert make_request([1, 2], tokenizer=None).prompt_token_ids == [1, 2]
    with pytest.raises(RequestError, match="send token ids instead"):
        make_request("text", tokenizer=None)
    with pytest.raises(RequestError, match="bad_words needs a tokenizer"):
        make_request([1], tokenizer=None, bad_words=["x"])


def test_a_prompt_to_embed_may_fill_the_context() -> None:
    inputs = InputProcessor(MODEL, None, max_model_len=100, max_logprobs=5, seed=0)
    for num_tokens, keep, kept in ((100, None, 100), (130, -1, 100), (130, 7, 7)):
        params = SamplingParams(truncate_prompt_tokens=keep)
        request, _ = inputs.make_request("a", [5] * num_tokens, params, task=Task.EMBED)
        assert (len(request.prompt_token_ids), request.max_tokens) == (kept, 0)
    with pytest.raises(
        RequestError,
        match=r"has 101 tokens, but .*maximum context length is 100 tokens",
    ):
        inputs.make_request("a", [5] * 101, SamplingParams(), task=Task.EMBED)
