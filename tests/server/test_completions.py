"""/v1/completions through the openai client: every shape of prompt, and echo with logprobs as evaluations use it."""

import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine, bundled_tokenizer

PROMPT = "Friends, Romans"


def ids(text: str) -> list[int]:
    return bundled_tokenizer().encode(text)


def test_answers(client: OpenAI, engine: ScriptedEngine) -> None:
    reply = client.completions.create(model="scripted", prompt=PROMPT, max_tokens=200)
    assert reply.object == "text_completion"
    assert reply.choices[0].text == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs is None
    assert engine.calls[0].prompt == ids(PROMPT)
    default = client.completions.create(model="scripted", prompt=PROMPT)
    assert default.choices[0].finish_reason in ("stop", "length")
    assert engine.calls[1].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one", [ids("one")]),
        (["one", "two", "three"], [ids("one"), ids("two"), ids("three")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_shapes_of_prompts(client: OpenAI, engine: ScriptedEngine, prompt: Any, expected: Any, stream: bool) -> None:
    reply: Any = client.completions.create(model="scripted", prompt=prompt, n=2, max_tokens=100, stream=stream)
    texts: dict[int, str] = {}
    for part in reply if stream else [reply]:
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == dict.fromkeys(range(2 * len(expected)), ANSWER)
    assert sorted(call.prompt for call in engine.calls) == sorted(expected)


def test_special_tokens_can_be_left_out(client: OpenAI, engine: ScriptedEngine) -> None:
    client.completions.create(model="scripted", prompt=PROMPT, extra_body={"add_special_tokens": False})
    assert engine.calls[0].prompt == bundled_tokenizer().encode(PROMPT, add_special_tokens=False)


def test_stream_options(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="scripted", prompt=[PROMPT, "x"], stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len(ids(PROMPT)) + len(ids("x"))
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(client: OpenAI, max_tokens: int) -> None:
    reply = client.completions.create(
        model="scripted", prompt=ids(PROMPT), echo=True, logprobs=1, max_tokens=max_tokens
    )
    scores = reply.choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert scores.top_logprobs is not None
    assert len(scores.tokens) == len(ids(PROMPT)) + max_tokens
    assert scores.token_logprobs[0] is None
    assert set(scores.token_logprobs[1:]) == {-3.0}
    assert scores.top_logprobs[0] is None
    assert all(max(top.values()) == -1.0 for top in scores.top_logprobs[1:])
    assert "".join(scores.tokens).endswith(reply.choices[0].text[-3:])
    assert reply.usage is not None
    assert reply.usage.completion_tokens == max_tokens


def test_echo_returns_the_text_as_sent(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "scripted", "prompt": PROMPT, "echo": True, "max_tokens": 2}
    text = client.completions.create(**asked).choices[0].text
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)
    assert "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True)) == text
    asked["max_tokens"] = 0
    assert client.completions.create(**asked).choices[0].text == PROMPT


@pytest.mark.parametrize(
    ("prompt", "offsets"),
    [
        ("é: ", [0, 0, 0, 1, 2]),
        ([0, 818], [0, 9]),
        ("<|begin|>ROMEO", [0, 0, 9]),
        ("<|end|><|end|>a", [0, 0, 7, 14]),
    ],
)
def test_offsets_of_the_prompt(client: OpenAI, prompt: Any, offsets: list[int]) -> None:
    choice = client.completions.create(model="scripted", prompt=prompt, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == offsets


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("answer", [ANSWER, "é🎭 – naïve", "<|end|>x, y"])
def test_offsets_point_into_the_text(client: OpenAI, engine: ScriptedEngine, answer: str, echo: bool) -> None:
    engine.answer = answer
    asked: dict[str, Any] = {"model": "scripted", "prompt": PROMPT, "echo": echo, "logprobs": 0, "max_tokens": 30}
    asked["extra_body"] = {"skip_special_tokens": False}
    choice = client.completions.create(**asked).choices[0]
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert len(tokens) == len(offsets) > 3
    assert offsets == sorted(offsets)
    if answer == ANSWER:
        for token, offset in list(zip(tokens, offsets, strict=True))[1:]:
            assert choice.text[offset:].startswith(token)
    streamed = [c.choices[0].logprobs for c in client.completions.create(**asked, stream=True)]
    assert [offset for part in streamed if part for offset in part.text_offset or []] == offsets


def test_streamed_logprobs_are_the_same(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "scripted",
        "prompt": PROMPT,
        "logprobs": 2,
        "echo": True,
        "max_tokens": 5,
    }
    whole = client.completions.create(**asked).choices[0].logprobs
    parts = [c.choices[0].logprobs for c in client.completions.create(**asked, stream=True)]
    assert whole is not None
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [item for part in parts if part for item in getattr(part, name)] == getattr(whole, name)


def test_token_ids_and_their_names(client: OpenAI) -> None:
    reply = client.completions.create(
        model="scripted",
        prompt=[5, 6],
        max_tokens=2,
        logprobs=0,
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True, "prompt_logprobs": 1},
    )
    choice = reply.choices[0]
    assert choice.model_extra is not None
    assert choice.model_extra["prompt_token_ids"] == [5, 6]
    assert choice.model_extra["prompt_logprobs"][0] is None
    assert choice.model_extra["prompt_logprobs"][1]["6"]["logprob"] == -3.0
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.model_extra["token_ids"]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1] * 300}, "prompt"),
        ({"prompt": ["x"] * 600, "n": 2}, "prompt"),
        ({"prompt": ["x"] * 20_000}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_whitespace_pattern": " ", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"truncation_side": "right"}, "truncation_side"),
        ({"truncation_side": "middle", "truncate_prompt_tokens": 3}, "truncation_side"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 300}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
)
def test_refuses_by_name(client: OpenAI, engine: ScriptedEngine, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="scripted", prompt=PROMPT, extra_body=fields)
    assert refused.value.param == param
    assert engine.calls == []


def test_one_refused_prompt_refuses_all(client: OpenAI, engine: ScriptedEngine) -> None:
    with pytest.raises(BadRequestError, match="prompt 1 has 300 tokens"):
        client.completions.create(model="scripted", prompt=[[1], [2] * 300], stream=True)
    assert engine.calls == []


def test_a_request_fails_if_all_its_samples_fail(server: RunningServer, engine: ScriptedEngine) -> None:
    engine.fail_at = 1
    response, reply = server.send("POST", "/v1/completions", {"prompt": ["a", "b", "c"]})
    assert response.status == 500
    assert reply["error"]["code"] == "sample_failed"
    assert engine.num_running == 0


@pytest.mark.parametrize("failure", ["the logits were not finite", "no token is left to sample: every logit is −inf"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_sample_fails_alone(server: RunningServer, engine: ScriptedEngine, path: str, failure: str) -> None:
    engine.fail_at, engine.fails, engine.failure = 1, (1,), failure
    prompt = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    _, reply = server.send("POST", path, {**prompt, "n": 3})
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["stop", "error", "stop"]
    error = reply["choices"][1]["error"]
    assert error["message"] == failure
    assert error["code"] == ("sample_failed" if "finite" in failure else "contradictory_parameters")
    assert "error" not in reply["choices"][0]
    _, text = server.send("POST", path, {**prompt, "n": 3, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    failed = [choice for event in events for choice in event["choices"] if "error" in choice]
    assert [(choice["index"], choice["error"]) for choice in failed] == [(1, error)]


def test_parameters_that_leave_no_token_are_the_clients_mistake(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.fail_at, engine.failure = 0, "no token is left to sample: every logit is −inf"
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="scripted", prompt=PROMPT)
    assert refused.value.code == "contradictory_parameters"
