"""One check of a prompt's length for the server, the front and the core, with one sentence."""

from typing import Any

import pytest

from quire.engine.checkpoint import bundled_folder
from quire.engine.input_processor import InputProcessor
from quire.engine.limits import check_request
from quire.errors import RequestError
from quire.model_config import ModelConfig
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.server.limits import check_lengths

MAX_MODEL_LEN = 50


def refusal_by_server(prompt: list[int]) -> RequestError:
    with pytest.raises(RequestError) as refusal:
        check_lengths([prompt], SamplingParams(), MAX_MODEL_LEN)
    return refusal.value


def refusal_by_front(prompt: list[int]) -> RequestError:
    model = ModelConfig.from_folder(bundled_folder())
    inputs = InputProcessor(model, None, max_model_len=MAX_MODEL_LEN, max_logprobs=5, seed=0)
    with pytest.raises(RequestError) as refusal:
        inputs.make_request("a", prompt, SamplingParams())
    return refusal.value


def refusal_by_core(prompt: list[int]) -> RequestError:
    request = Request(request_id="a", prompt_token_ids=prompt, params=SamplingParams())
    with pytest.raises(RequestError) as refusal:
        check_request(request, vocab_size=10, max_logprobs=5, max_model_len=MAX_MODEL_LEN)
    return refusal.value


@pytest.mark.parametrize("num_tokens", [0, MAX_MODEL_LEN, MAX_MODEL_LEN + 7])
def test_all_refuse_with_one_sentence(num_tokens: int) -> None:
    refusals = [refuse([1] * num_tokens) for refuse in (refusal_by_server, refusal_by_front, refusal_by_core)]
    assert len({(refusal.message, refusal.param, refusal.code) for refusal in refusals}) == 1
    assert refusals[0].param == "prompt"


def test_the_server_names_the_prompt_and_leaves_truncation_to_the_front() -> None:
    long = [1] * MAX_MODEL_LEN
    with pytest.raises(
        RequestError,
        match=r"prompt 1 has 50 tokens, but .*maximum context length is 50 tokens, output included: ",
    ):
        check_lengths([[1], long], SamplingParams(), MAX_MODEL_LEN)
    check_lengths([[1], long], SamplingParams(truncate_prompt_tokens=-1), MAX_MODEL_LEN)
    with pytest.raises(RequestError, match="prompt 0 is empty"):
        check_lengths([[], long], SamplingParams(truncate_prompt_tokens=-1), MAX_MODEL_LEN)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bad_words_token_ids": [[4], [5], [6, 7]]}, "bad_words"),
        ({"min_tokens": 2, "stop_token_ids": [4, 5]}, "min_tokens"),
        ({"min_tokens": 2, "stop_token_ids": [4], "bad_words_token_ids": [[5]]}, "bad_words and min_tokens"),
        ({"bad_words_token_ids": [[4]]}, None),
        ({"bad_words_token_ids": [[4], [5, 4]]}, None),
        ({"stop_token_ids": [4, 5]}, None),
    ],
)
def test_parameters_that_leave_no_token(options: dict[str, Any], named: str | None) -> None:
    params = SamplingParams(allowed_token_ids=[4, 5], max_tokens=5, **options)
    request = Request(request_id="a", prompt_token_ids=[1], params=params, eos_token_ids=(2,))

    def check() -> None:
        check_request(request, vocab_size=10, max_logprobs=5, max_model_len=MAX_MODEL_LEN)

    if named is None:
        check()
        return
    with pytest.raises(RequestError, match=f"all are forbidden by {named};") as refusal:
        check()
    assert refusal.value.param == "allowed_token_ids"
