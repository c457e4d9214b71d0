"""openai for Python: the programs of its README and of OpenAI's guides."""

import json
import time
from typing import Any

from openai import OpenAI
from pydantic import BaseModel
from show import ANSWER, BASE_URL, KEY, MODEL, QUESTION, REPORT, equal, get_weather, show

client = OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Person(BaseModel):
    name: str
    age: int


def chat() -> None:
    completion = client.chat.completions.create(model=MODEL, messages=HELLO)
    equal(completion.choices[0].message.content, ANSWER)
    equal(completion.choices[0].finish_reason, "stop")
    assert client.models.list().data[0].id == MODEL


def stream() -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
    )
    equal("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), ANSWER)
    assert chunks[-1].usage is not None
    with client.chat.completions.stream(model=MODEL, messages=HELLO) as events:
        equal(events.get_final_completion().choices[0].message.content, ANSWER)


def tools() -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    for choice in ("auto", "required", {"type": "function", "function": {"name": "get_weather"}}):
        message = (
            client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], tool_choice=choice)
            .choices[0]
            .message
        )
        (call,) = message.tool_calls or ()
        equal(json.loads(call.function.arguments), {"city": "Paris"})
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=[WEATHER]) as events:
        done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
        equal(done[0].parsed_arguments, {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call.id, "content": get_weather("Paris")}
    messages += [message, result]
    last = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    equal(last.choices[0].message.content, REPORT)


def structured_output() -> None:
    completion = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Person)
    equal(completion.choices[0].message.parsed, Person(name="Ada", age=36))


def embeddings() -> None:
    reply = client.embeddings.create(model=MODEL, input=["one", "two words"])
    equal([len(item.embedding) for item in reply.data], [4, 4])
    plain = client.embeddings.create(model=MODEL, input=["one"], encoding_format="float")
    pairs = zip(plain.data[0].embedding, reply.data[0].embedding, strict=True)  # base64 brings float32
    assert all(abs(a - b) < 1e-6 for a, b in pairs)


def completions() -> None:
    equal(client.completions.create(model=MODEL, prompt="Hello", max_tokens=100).choices[0].text, ANSWER)


def responses() -> None:
    first = client.responses.create(model=MODEL, input="Hello", instructions="Be brief.")
    equal(first.output_text, ANSWER)
    equal(client.responses.retrieve(first.id).output_text, ANSWER)
    tool: Any = {"type": "function", **WEATHER["function"]}
    asked = client.responses.create(model=MODEL, input=QUESTION, tools=[tool])
    (call,) = [item for item in asked.output if item.type == "function_call"]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": get_weather("Paris")}
    with client.responses.stream(model=MODEL, input=[output], previous_response_id=asked.id, tools=[tool]) as events:
        equal(events.get_final_response().output_text, REPORT)
    parsed = client.responses.parse(model=MODEL, input="Hello", text_format=Person)
    equal(parsed.output_parsed, Person(name="Ada", age=36))


def batches() -> None:
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": MODEL, "messages": HELLO},
    }
    file = client.files.create(file=("input.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    end = time.monotonic() + 60
    while batch.status not in ("completed", "failed") and time.monotonic() < end:
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id is not None, batch
    answer = json.loads(client.files.content(batch.output_file_id).text)
    equal(answer["response"]["body"]["choices"][0]["message"]["content"], ANSWER)


show(
    chat=chat,
    stream=stream,
    tools=tools,
    structured_output=structured_output,
    embeddings=embeddings,
    completions=completions,
    responses=responses,
    batches=batches,
)
