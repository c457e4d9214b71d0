"""Flaws published for other servers, tried on combinations of fields and on numbers that a client chooses."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BOTH: dict[str, dict[str, Any]] = {
    "stream": {"stream": True},
    "usage": {"stream_options": {"include_usage": True}},
    "n": {"n": 2},
    "beams": {"use_beam_search": True, "n": 2, "temperature": 0},
    "stop": {"stop": ["x"]},
    "no text": {"detokenize": False},
    "prompt scores": {"prompt_logprobs": 1},
    "ids": {"return_token_ids": True},
    "regex": {"structured_outputs": {"regex": "[a-z]+"}},
    "object": {"response_format": {"type": "json_object"}},
    "truncated": {"truncate_prompt_tokens": 1},
    "min tokens": {"min_tokens": 2},
    "bad words": {"bad_words": ["x"]},
    "allowed": {"allowed_token_ids": [5]},
    "salt": {"cache_salt": "s"},
    "priority": {"priority": -5},
}
FORMS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "/v1/completions": (
        {"prompt": "x", "max_tokens": 2},
        {
            **BOTH,
            "logprobs": {"logprobs": 2},
            "best": {"best_of": 3},
            "echo": {"echo": True},
            "suffix": {"suffix": "y"},
            "prompts": {"prompt": ["x", "y"]},
            "ids in": {"prompt": [5, 6]},
            "nothing": {"max_tokens": 0},
            "embeds": {"prompt_embeds": "x"},
        },
    ),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
        {
            **BOTH,
            "logprobs": {"logprobs": True, "top_logprobs": 2},
            "tools": {"tools": [TOOL]},
            "forced": {"tools": [TOOL], "tool_choice": "required"},
            "reasoning": {"reasoning_effort": "low"},
            "continued": {"continue_final_message": True, "add_generation_prompt": False},
            "image": {"messages": [{"role": "user", "content": [IMAGE]}]},
            "audio": {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        },
    ),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    with RunningServer(ScriptedEngine()) as running:
        yield running


@pytest.mark.parametrize("path", FORMS)
def test_29_every_pair_of_features_is_served_or_refused(path: str, shared: RunningServer) -> None:
    """PYSEC-2026-2303: a combination that nobody had thought of met an assert in the engine."""
    form, features = FORMS[path]
    for one, other in combinations(features, 2):
        response, reply = shared.send("POST", path, {**form, **features[one], **features[other]})
        assert response.status in (200, 400), (one, other, reply)
        if response.status == 400:
            assert reply["error"]["message"], (one, other)
    assert shared.send("POST", path, form)[0].status == 200


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "logit_bias": {"-1": 1}},
        {"prompt": "x", "stop_token_ids": [-2]},
        {"prompt": "x", "truncate_prompt_tokens": -(2**40)},
        {"prompt": "x", "min_tokens": 2**40},
    ],
    ids=str,
)
def test_38_no_number_of_a_client_leads_into_memory(body: dict[str, Any], shared: RunningServer) -> None:
    """CVE-2026-21869, CVE-2026-43629, CVE-2026-43632: indices out of bounds."""
    response, reply = shared.send("POST", "/v1/completions", {"max_tokens": 2, **body})
    assert response.status == 400, reply


def test_38_no_state_is_uploaded_and_no_parser_is_sent(shared: RunningServer) -> None:
    """CVE-2026-107183: llama.cpp's fields and routes for slots, saved states and parsers."""
    for path in ("/slots", "/slots/0?action=restore", "/slots/0?action=save", "/lora-adapters", "/props"):
        response, _ = shared.send("POST", path, {"filename": "../../etc/passwd"})
        assert response.status in (404, 405), path
    for field in (
        {"n_discard": -(2**31), "n_keep": 2**31},
        {"id_slot": -7},
        {"chat_parser": "x", "grammar_lazy": True},
    ):
        response, reply = shared.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2, **field})
        assert response.status == 200, "a field that is none is not read"
        assert reply["choices"][0]["text"]
