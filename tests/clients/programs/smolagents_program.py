"""smolagents: the programs of its guided tour."""

from typing import Any

from show import ANSWER, BASE_URL, KEY, MODEL, QUESTION, REPORT, equal, show
from show import get_weather as look
from smolagents import ChatMessageStreamDelta, OpenAIModel, ToolCallingAgent, tool

model = OpenAIModel(model_id=MODEL, api_base=BASE_URL, api_key=KEY)
HELLO: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city.

    Args:
        city: The city's name.
    """
    return look(city)


def chat() -> None:
    equal(model.generate(HELLO).content, ANSWER)


def stream() -> None:
    parts = [part for part in model.generate_stream(HELLO) if isinstance(part, ChatMessageStreamDelta)]
    equal("".join(part.content or "" for part in parts), ANSWER)


def tools() -> None:
    for streams in (False, True):
        agent = ToolCallingAgent(tools=[get_weather], model=model, stream_outputs=streams, verbosity_level=0)
        equal(agent.run(QUESTION), REPORT)


show(chat=chat, stream=stream, tools=tools)
