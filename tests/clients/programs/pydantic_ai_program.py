"""pydantic-ai: the programs of its pages on OpenAI-compatible models."""

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from show import ANSWER, BASE_URL, KEY, MODEL, QUESTION, REPORT, equal, get_weather, show

provider = OpenAIProvider(base_url=BASE_URL, api_key=KEY)
model = OpenAIChatModel(MODEL, provider=provider)


class Person(BaseModel):
    name: str
    age: int


async def chat() -> None:
    equal((await Agent(model).run("Hello")).output, ANSWER)


async def stream() -> None:
    async with Agent(model).run_stream("Hello") as reply:
        *_, last = [text async for text in reply.stream_text()]
    equal(last, ANSWER)


async def tools() -> None:
    agent = Agent(model)
    agent.tool_plain(get_weather)
    equal((await agent.run(QUESTION)).output, REPORT)
    async with agent.run_stream(QUESTION) as reply:
        equal(await reply.get_output(), REPORT)


async def structured_output() -> None:
    for kind in (Person, NativeOutput(Person)):  # by default a forced call
        reply = await Agent(model, output_type=kind).run("Hello")
        equal(reply.output, Person(name="Ada", age=36))


async def responses() -> None:
    equal((await Agent(OpenAIResponsesModel(MODEL, provider=provider)).run("Hello")).output, ANSWER)


show(chat=chat, stream=stream, tools=tools, structured_output=structured_output, responses=responses)
