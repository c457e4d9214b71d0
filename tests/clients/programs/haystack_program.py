"""Haystack: the programs of its OpenAI components."""

from haystack.components.agents import Agent
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret
from pydantic import BaseModel
from show import ANSWER, BASE_URL, KEY, MODEL, QUESTION, REPORT, equal, get_weather, show

HELLO = [ChatMessage.from_user("Hello")]


class Person(BaseModel):
    name: str
    age: int


def generator(**options: object) -> OpenAIChatGenerator:
    key = Secret.from_token(KEY)
    return OpenAIChatGenerator(api_key=key, model=MODEL, api_base_url=BASE_URL, max_retries=0, **options)


def chat() -> None:
    equal(generator().run(HELLO)["replies"][0].text, ANSWER)


def stream() -> None:
    parts: list[str] = []
    generator(streaming_callback=lambda chunk: parts.append(chunk.content)).run(HELLO)
    equal("".join(parts), ANSWER)


def tools() -> None:
    agent = Agent(chat_generator=generator(), tools=[create_tool_from_function(get_weather)])
    equal(agent.run(messages=[ChatMessage.from_user(QUESTION)])["messages"][-1].text, REPORT)


def structured_output() -> None:
    reply = generator(generation_kwargs={"response_format": Person}).run(HELLO)["replies"][0]
    equal(Person.model_validate_json(reply.text or ""), Person(name="Ada", age=36))


def embeddings() -> None:
    embedder = OpenAITextEmbedder(api_key=Secret.from_token(KEY), model=MODEL, api_base_url=BASE_URL)
    equal(len(embedder.run("one")["embedding"]), 4)


show(chat=chat, stream=stream, tools=tools, structured_output=structured_output, embeddings=embeddings)
