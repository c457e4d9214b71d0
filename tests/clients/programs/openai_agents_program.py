"""openai-agents: the programs of its quickstart, on responses (its default) and on chats."""

from typing import Any

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel
from show import ANSWER, BASE_URL, KEY, MODEL, QUESTION, REPORT, equal, show
from show import get_weather as look

set_tracing_disabled(True)
get_weather = function_tool(look)


class Person(BaseModel):
    name: str
    age: int


def models() -> list[Any]:
    client = AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
    return [kind(model=MODEL, openai_client=client) for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel)]


async def chat() -> None:
    reply = await Runner.run(Agent(name="Bard", model=models()[1]), "Hello")
    equal(reply.final_output, ANSWER)


async def responses() -> None:
    reply = await Runner.run(Agent(name="Bard", model=models()[0]), "Hello")
    equal(reply.final_output, ANSWER)


async def stream() -> None:
    for model in models():
        run = Runner.run_streamed(Agent(name="Bard", model=model), "Hello")
        events = [event async for event in run.stream_events() if event.type == "raw_response_event"]
        deltas = [event.data.delta for event in events if event.data.type == "response.output_text.delta"]
        equal("".join(deltas), ANSWER)


async def tools() -> None:
    for model in models():
        agent = Agent(name="Weather", model=model, tools=[get_weather])
        equal((await Runner.run(agent, QUESTION)).final_output, REPORT)


async def structured_output() -> None:
    for model in models():
        agent = Agent(name="Clerk", model=model, output_type=Person)
        equal((await Runner.run(agent, "Hello")).final_output, Person(name="Ada", age=36))


show(chat=chat, stream=stream, tools=tools, structured_output=structured_output, responses=responses)
