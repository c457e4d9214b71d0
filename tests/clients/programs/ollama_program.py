"""ollama for Python: the programs of its README."""

from typing import Any

from ollama import Client
from pydantic import BaseModel
from show import ANSWER, MODEL, QUESTION, REPORT, SERVER, equal, get_weather, show

client = Client(host=SERVER)
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


class Person(BaseModel):
    name: str
    age: int


def chat() -> None:
    equal(client.chat(model=MODEL, messages=HELLO).message.content, ANSWER)


def stream() -> None:
    parts = client.chat(model=MODEL, messages=HELLO, stream=True)
    equal("".join(part["message"]["content"] for part in parts), ANSWER)


def tools() -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    reply = client.chat(model=MODEL, messages=messages, tools=[get_weather])
    (call,) = reply.message.tool_calls or ()
    result = get_weather(**call.function.arguments)
    messages += [reply.message, {"role": "tool", "tool_name": call.function.name, "content": result}]
    equal(client.chat(model=MODEL, messages=messages, tools=[get_weather]).message.content, REPORT)


def structured_output() -> None:
    reply = client.chat(model=MODEL, messages=HELLO, format=Person.model_json_schema())
    equal(Person.model_validate_json(reply.message.content or ""), Person(name="Ada", age=36))


def embeddings() -> None:
    equal([len(vector) for vector in client.embed(model=MODEL, input=["one", "two words"]).embeddings], [4, 4])


def completions() -> None:
    equal(client.generate(model=MODEL, prompt="Hello").response, ANSWER)


def models() -> None:
    assert any((model.model or "").startswith(MODEL) for model in client.list().models)
    client.show(MODEL)
    client.ps()


show(
    chat=chat,
    stream=stream,
    tools=tools,
    structured_output=structured_output,
    embeddings=embeddings,
    completions=completions,
    models=models,
)
