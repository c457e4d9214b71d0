"""LiteLLM: the programs of its pages on OpenAI-compatible servers and on vLLM."""

import json
from typing import Any

import litellm
from pydantic import BaseModel
from show import ANSWER, BASE_URL, KEY, MODEL, QUESTION, REPORT, SERVER, equal, get_weather, show

options: Any = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE_URL, "api_key": KEY, "num_retries": 0}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Person(BaseModel):
    name: str
    age: int


def chat() -> None:
    for model, base in (
        (f"hosted_vllm/{MODEL}", BASE_URL),
        (f"openai/{MODEL}", BASE_URL),
        (f"ollama_chat/{MODEL}", SERVER),
    ):
        reply: Any = litellm.completion(messages=HELLO, **{**options, "model": model, "api_base": base})
        equal(reply.choices[0].message.content, ANSWER)
    claude: Any = litellm.completion(
        messages=HELLO, **{**options, "model": f"anthropic/{MODEL}", "api_base": SERVER}, max_tokens=1000
    )
    equal(claude.choices[0].message.content, ANSWER)


async def stream() -> None:
    parts: Any = await litellm.acompletion(messages=HELLO, stream=True, **options)
    equal("".join([part.choices[0].delta.content or "" async for part in parts]), ANSWER)


def tools() -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    for choice in ("auto", "required"):
        reply: Any = litellm.completion(messages=messages, tools=[WEATHER], tool_choice=choice, **options)
        (call,) = reply.choices[0].message.tool_calls
    result = get_weather(**json.loads(call.function.arguments))
    messages += [reply.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    last: Any = litellm.completion(messages=messages, tools=[WEATHER], **options)
    equal(last.choices[0].message.content, REPORT)


def structured_output() -> None:
    reply: Any = litellm.completion(messages=HELLO, response_format=Person, **options)
    equal(Person.model_validate_json(reply.choices[0].message.content), Person(name="Ada", age=36))


def embeddings() -> None:
    reply: Any = litellm.embedding(input=["one", "two words"], **options)
    equal([len(item["embedding"]) for item in reply.data], [4, 4])


def completions() -> None:
    reply: Any = litellm.text_completion(prompt="Hello", **{**options, "model": f"text-completion-openai/{MODEL}"})
    equal(reply.choices[0].text, ANSWER)


def responses() -> None:
    reply: Any = litellm.responses(input="Hello", **{**options, "model": f"openai/{MODEL}"})
    equal(reply.output[0].content[0].text, ANSWER)


def overflow() -> None:
    for model in (f"hosted_vllm/{MODEL}", f"openai/{MODEL}"):
        try:
            litellm.completion(messages=[{"role": "user", "content": "word " * 300_000}], **{**options, "model": model})
        except litellm.ContextWindowExceededError:
            continue
        raise AssertionError(f"no ContextWindowExceededError for {model}")


show(
    chat=chat,
    stream=stream,
    tools=tools,
    structured_output=structured_output,
    embeddings=embeddings,
    completions=completions,
    responses=responses,
    overflow=overflow,
)
