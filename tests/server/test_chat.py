"""/v1/chat/completions through the openai client."""

from typing import Any

import pytest
from openai import BadRequestError, InternalServerError, NotFoundError, OpenAI, RateLimitError

from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine, bundled_tokenizer

HELLO: list[Any] = [{"role": "user", "content": "Who goes there?"}]


def test_answers(client: OpenAI, engine: ScriptedEngine) -> None:
    reply = client.chat.completions.create(model="scripted", messages=HELLO)
    assert reply.object == "chat.completion"
    assert reply.model == "scripted"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    num_tokens = len(bundled_tokenizer().encode(ANSWER, add_special_tokens=False))
    assert reply.usage.completion_tokens == num_tokens
    assert reply.usage.total_tokens == num_tokens + reply.usage.prompt_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 2
    assert engine.calls[0].params.max_tokens is None


def test_prompt_is_the_rendered_template(client: OpenAI, engine: ScriptedEngine) -> None:
    client.chat.completions.create(
        model="alias",
        messages=[{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, *HELLO],
    )
    text = bundled_tokenizer().decode(engine.calls[0].prompt, skip_special_tokens=False)
    assert "<|system|>Be brief." in text
    assert text.endswith("<|assistant|>")


def test_streams_text_role_and_usage(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="scripted", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [c.id for c in chunks] == [chunks[0].id] * len(chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 5
    assert all(c.usage is None for c in chunks[:-1])


def test_continuous_usage(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(model="scripted", messages=HELLO, stream=True, stream_options=options))
    counts = [c.usage.completion_tokens for c in chunks if c.usage is not None]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)


def test_several_choices(client: OpenAI) -> None:
    reply = client.chat.completions.create(model="scripted", messages=HELLO, n=3, max_tokens=2)
    assert [c.index for c in reply.choices] == [0, 1, 2]
    assert {c.finish_reason for c in reply.choices} == {"length"}
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(model="scripted", messages=HELLO, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert set(texts.values()) == {ANSWER}


def test_logprobs(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="scripted", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=3
    )
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content
    assert content is not None
    assert "".join(entry.token for entry in content) == reply.choices[0].message.content
    assert bytes(content[0].bytes or []).decode() == content[0].token
    assert content[0].logprob == -3.0
    assert [top.logprob for top in content[0].top_logprobs] == [-1.0, -2.0]
    bare = client.chat.completions.create(model="scripted", messages=HELLO, logprobs=True, max_tokens=3)
    assert bare.choices[0].logprobs is not None
    assert bare.choices[0].logprobs.content is not None
    assert bare.choices[0].logprobs.content[0].top_logprobs == []


def test_streamed_logprobs_are_the_same(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "scripted", "messages": HELLO, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    entries = [
        entry
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert whole is not None
    assert entries == whole.content


def test_parameters_reach_the_engine(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.default_params = {"temperature": 0.6, "top_p": 0.9}
    extra = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": [3],
        "priority": -2,
        "cache_salt": "pepper",
        "truncate_prompt_tokens": 4,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "vllm_xargs": {"ban": 7, "name": "x", "flag": True},
        "an_unknown_field": {"of": ["any", "kind"]},
    }
    client.chat.completions.create(
        model="scripted",
        messages=HELLO,
        max_completion_tokens=9,
        temperature=0.5,
        stop=["x", "y"],
        seed=11,
        logit_bias={"7": -1},
        presence_penalty=0.2,
        frequency_penalty=0.3,
        extra_body=extra,
    )
    call = engine.calls[0]
    params = call.params
    assert (params.max_tokens, params.temperature, params.top_p) == (9, 0.5, 0.9)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.1)
    assert (params.stop, params.stop_token_ids, params.seed) == (("x", "y"), (3,), 11)
    assert params.logit_bias == {7: -1}
    assert (params.presence_penalty, params.frequency_penalty) == (0.2, 0.3)
    assert (params.ignore_eos, params.min_tokens, params.truncate_prompt_tokens) == (True, 2, 4)
    assert (params.skip_special_tokens, params.include_stop_str_in_output) == (False, True)
    assert (call.priority, call.cache_salt) == (-2, "pepper")
    assert params.extra == {"ban": "7", "name": "x", "flag": "true"}


def test_the_workload_is_the_route_and_the_system_prompt(client: OpenAI, engine: ScriptedEngine) -> None:
    for system in ("Be brief.", "Be brief.", "Be long.", None):
        messages: Any = [{"role": "user", "content": f"Hello, {system}"}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        client.chat.completions.create(model="scripted", messages=messages)
    client.completions.create(model="scripted", prompt="x")
    brief, again, long, chat, completion = (call.workload for call in engine.calls)
    assert brief == again
    assert len({brief, long, chat, completion}) == 4


def test_continues_the_final_message(client: OpenAI, engine: ScriptedEngine) -> None:
    reply = client.chat.completions.create(
        model="scripted",
        messages=[*HELLO, {"role": "assistant", "content": "A friend of"}],
        extra_body={"continue_final_message": True, "echo": True, "return_token_ids": True},
    )
    assert bundled_tokenizer().decode(engine.calls[0].prompt).endswith("A friend of")
    assert reply.choices[0].message.content == "A friend of" + ANSWER
    assert reply.model_extra is not None
    assert reply.model_extra["prompt_token_ids"] == engine.calls[0].prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"best_of": 4, "stream": True}, "best_of"),
        ({"use_beam_search": True, "temperature": 0.7}, "beam_width"),
        ({"beam_width": 2, "n": 3}, "n"),
        ({"beam_width": 4, "best_of": 4}, "best_of"),
        ({"early_stopping": "never"}, "early_stopping"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"n": 1000}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 40_000}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"vllm_xargs": {str(number): 1 for number in range(99)}}, "vllm_xargs"),
        ({"mm_processor_kwargs": {"x": 1}}, "mm_processor_kwargs"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
        ({"max_completion_tokens": 300}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": -5}, "top_logprobs"),
    ],
)
def test_refuses_by_name(client: OpenAI, engine: ScriptedEngine, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(BadRequestError) as refused:
            client.chat.completions.create(model="scripted", messages=HELLO, stream=stream, extra_body=fields)
        assert refused.value.param == param
        assert refused.value.type == "invalid_request_error"
    assert engine.calls == []


def test_tools_are_ignored_with_tool_choice_none(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="scripted",
        messages=HELLO,
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="none",
        extra_body={"best_of": 1, "response_format": {"type": "text"}},
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_unknown_model(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="there is scripted, alias") as refused:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert refused.value.code == "model_not_found"


def test_no_chat_template(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.chat_template = None
    with pytest.raises(BadRequestError, match="no chat template"):
        client.chat.completions.create(model="scripted", messages=HELLO)


def test_full_queue(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.full = True
    for stream in (False, True):
        with pytest.raises(RateLimitError) as refused:
            client.chat.completions.create(model="scripted", messages=HELLO, stream=stream)
        assert refused.value.response.headers["retry-after"] == "7"


def test_failed_sample(server: RunningServer, client: OpenAI, engine: ScriptedEngine) -> None:
    engine.fail_at = 2
    with pytest.raises(InternalServerError, match="not finite"):
        client.chat.completions.create(model="scripted", messages=HELLO)
    _, text = server.send("POST", "/v1/chat/completions", {"model": "scripted", "messages": HELLO, "stream": True})
    events = text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert '"code":"sample_failed"' in events[-2]
    assert len(events) > 3


def test_bugs_are_errors_without_details(server: RunningServer, client: OpenAI, engine: ScriptedEngine) -> None:
    engine.raises = KeyError("/secret/path")
    with pytest.raises(InternalServerError) as bug:
        client.chat.completions.create(model="scripted", messages=HELLO)
    assert bug.value.code == "internal_error"
    assert "secret" not in str(bug.value)
    engine.raises_at = 3
    _, text = server.send("POST", "/v1/chat/completions", {"model": "scripted", "messages": HELLO, "stream": True})
    assert "secret" not in text
    assert text.endswith("data: [DONE]\n\n")
