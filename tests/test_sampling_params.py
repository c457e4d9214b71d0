"""SamplingParams: accepted values, their stored form, and one refusal per field."""

import math
from typing import Any

import pytest

from quire.errors import RequestError
from quire.sampling_params import SamplingParams

REFUSED: list[tuple[str, Any, str]] = [
    ("n", 0, "n is 0; it must be from 1 to 128"),
    ("n", 129, "n is 129; it must be from 1 to 128"),
    ("n", 1.5, "n is 1.5; it must be an integer"),
    ("n", True, "n is True; it must be an integer"),
    ("best_of", 0, "best_of is 0; it must be from 1 to 128"),
    ("best_of", 129, "best_of is 129; it must be from 1 to 128"),
    ("temperature", -0.1, "temperature is -0.1; it must be at least 0 and at most 1e+06"),
    ("temperature", math.nan, "temperature is nan; it must be a finite number"),
    ("temperature", "hot", "temperature is 'hot'; it must be a finite number"),
    ("temperature", 10**400, "at most 1e+06"),
    ("beam_width", 65, "beam_width is 65; it must be from 1 to 64"),
    ("length_penalty", 11, "length_penalty is 11; it must be at least -10 and at most 10"),
    ("length_penalty", 2.0, "length_penalty belongs to a beam search: set beam_width"),
    ("early_stopping", "soon", "early_stopping is 'soon'; it must be true, false or \"never\""),
    ("early_stopping", 1, 'early_stopping is 1; it must be true, false or "never"'),
    ("top_p", 0.0, "top_p is 0.0; it must be more than 0 and at most 1"),
    ("top_p", 1.1, "top_p is 1.1; it must be more than 0 and at most 1"),
    ("top_k", -2, "top_k is -2; it must be from -1 to 2147483647"),
    ("min_p", 1.5, "min_p is 1.5; it must be at least 0 and at most 1"),
    ("presence_penalty", 2.1, "presence_penalty is 2.1; it must be at least -2 and at most 2"),
    ("frequency_penalty", -3, "frequency_penalty is -3; it must be at least -2 and at most 2"),
    ("repetition_penalty", 1e-38, "repetition_penalty is 1e-38; it must be at least 0.0001 and at most 10000"),
    ("repetition_penalty", 0, "repetition_penalty is 0; it must be at least 0.0001 and at most 10000"),
    (
        "seed",
        2**64,
        "seed is 18446744073709551616; it must be from -9223372036854775808 to 18446744073709551615",
    ),
    ("stop", ["ok", ""], "stop holds ''; each entry must be a non-empty string"),
    ("stop", ["x"] * 65, "stop holds 65 texts; at most 64 are allowed"),
    ("stop", ["x" * 1025], "stop holds a text of 1025 characters; at most 1024 are allowed"),
    ("stop", 1.5, "stop is 1.5; it must be a list"),
    ("stop_token_ids", [-1], "stop_token_ids is -1; it must be from 0 to 2147483647"),
    ("stop_token_ids", ["2"], "stop_token_ids is '2'; it must be an integer"),
    ("stop_token_ids", range(4097), "stop_token_ids holds 4097 tokens; at most 4096 are allowed"),
    ("ignore_eos", "yes", "ignore_eos is 'yes'; it must be true or false"),
    ("max_tokens", 0, "max_tokens is 0; it must be from 1 to 2147483647"),
    ("min_tokens", -1, "min_tokens is -1; it must be from 0 to 2147483647"),
    ("min_tokens", 17, "min_tokens is 17, more than max_tokens 16"),
    ("logprobs", -2, "logprobs is -2; it must be from -1 to 2147483647"),
    ("logprobs_mode", "raw", "logprobs_mode is 'raw'; it must be one of raw_logprobs, processed_logprobs"),
    ("logits_processors", ["f"], "logits_processors holds 'f'; each entry must be callable"),
    ("logits_processors", [len] * 17, "logits_processors holds 17 callables; at most 16 are allowed"),
    ("prompt_logprobs", -2, "prompt_logprobs is -2; it must be from -1 to 2147483647"),
    ("logit_bias", {5: 101}, "logit_bias of token 5 is 101; it must be at least -100 and at most 100"),
    ("logit_bias", {7: float("nan")}, "logit_bias of token 7 is nan; it must be a finite number"),
    ("logit_bias", {"five": 1}, "logit_bias has the key 'five'; keys are token ids"),
    ("logit_bias", {1.5: 1}, "logit_bias has the key 1.5; keys are token ids"),
    ("logit_bias", {-1: 1}, "logit_bias is -1; it must be from 0 to 2147483647"),
    ("logit_bias", [1], "logit_bias is [1]; it must map token ids to numbers"),
    ("logit_bias", dict.fromkeys(range(4097), 1), "logit_bias holds 4097 tokens; at most 4096 are allowed"),
    ("allowed_token_ids", [], "allowed_token_ids is empty: no token could be sampled"),
    ("allowed_token_ids", [2.5], "allowed_token_ids is 2.5; it must be an integer"),
    ("bad_words", ["x"] * 257, "bad_words holds 257 texts; at most 256 are allowed"),
    ("bad_words", [7], "bad_words holds 7; each entry must be a non-empty string"),
    ("bad_words_token_ids", [[1], []], "bad_words_token_ids holds an empty word; each needs a token"),
    ("bad_words_token_ids", [[1]] * 513, "bad_words_token_ids holds 513 words; at most 512 are allowed"),
    ("bad_words_token_ids", [[-5]], "bad_words_token_ids is -5; it must be from 0 to 2147483647"),
    ("skip_special_tokens", 1, "skip_special_tokens is 1; it must be true or false"),
    (
        "spaces_between_special_tokens",
        None,
        "spaces_between_special_tokens is None; it must be true or false",
    ),
    ("include_stop_str_in_output", 0, "include_stop_str_in_output is 0; it must be true or false"),
    ("truncate_prompt_tokens", 0, "truncate_prompt_tokens is 0; give −1 or at least 1"),
    ("truncate_prompt_tokens", -2, "truncate_prompt_tokens is -2; it must be from -1 to 2147483647"),
    ("detokenize", "no", "detokenize is 'no'; it must be true or false"),
    (
        "structured_outputs",
        {"regex": "a"},
        "structured_outputs is {'regex': 'a'}; it must be a StructuredOutputsParams",
    ),
    ("extra", {"label": 1}, "extra is {'label': 1}; it must map texts to texts"),
    ("extra", {str(i): "" for i in range(17)}, "extra holds 17 labels; at most 16 are allowed"),
    ("extra", {"label": "x" * 513}, "extra holds a text of 513 characters; at most 512 are allowed"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_a_refusal_names_field_value_and_limit(field: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError) as refusal:
        SamplingParams(**{field: value})
    assert refusal.value.param == field
    assert message in refusal.value.message
    assert refusal.value.status == 400


def test_every_field_is_refused_somewhere() -> None:
    assert {field for field, _, _ in REFUSED} == set(SamplingParams.__slots__)


def test_a_message_does_not_repeat_a_long_value() -> None:
    with pytest.raises(RequestError) as refusal:
        SamplingParams(temperature="x" * 10**6)  # type: ignore[arg-type]  # what a client may send
    assert len(refusal.value.message) < 200


def test_stop_strings_need_text() -> None:
    with pytest.raises(RequestError, match="set detokenize to true"):
        SamplingParams(stop=("x",), detokenize=False)


def test_limits_themselves_are_accepted() -> None:
    params = SamplingParams(n=128, temperature=0, top_p=1, top_k=-1, min_p=1, seed=-(2**63), max_tokens=1, min_tokens=1)
    assert (params.n, params.seed, params.min_tokens) == (128, -(2**63), 1)
    SamplingParams(temperature=1e6, top_p=1e-9, presence_penalty=-2, frequency_penalty=2, seed=2**64 - 1)
    SamplingParams(logprobs=-1, prompt_logprobs=0, truncate_prompt_tokens=-1, max_tokens=None, min_tokens=10**6)


def test_what_clients_send_is_kept_immutable_and_hashable() -> None:
    sent: dict[str, Any] = {
        "stop": "end",
        "stop_token_ids": [1, 2],
        "bad_words": ["no"],
        "bad_words_token_ids": [[3, 4]],
        "allowed_token_ids": [5],
        "logit_bias": {"6": 1.5, 7: -1},
    }
    params = SamplingParams(**sent)
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert params.bad_words == ("no",)
    assert params.bad_words_token_ids == ((3, 4),)
    assert params.allowed_token_ids == (5,)
    assert params.logit_bias == {6: 1.5, 7: -1}
    assert hash(params) == hash(SamplingParams(**sent))
    assert SamplingParams(stop=None) == SamplingParams()  # type: ignore[arg-type]  # null in JSON


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False), (1, False)])
def test_greedy_below_the_smallest_temperature(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_changes_are_validated() -> None:
    assert SamplingParams(top_k=5).with_changes(top_p=0.5) == SamplingParams(top_k=5, top_p=0.5)
    with pytest.raises(RequestError, match="top_k"):
        SamplingParams().with_changes(top_k=-5)


def test_best_of_is_at_least_n() -> None:
    with pytest.raises(RequestError, match="best_of is 2, less than n 3"):
        SamplingParams(n=3, best_of=2)
    assert SamplingParams(n=3, best_of=3).num_samples == SamplingParams(n=3).num_samples == 3
