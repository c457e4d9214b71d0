"""anthropic for Python: the programs of its README and of Anthropic's guides."""

from typing import Any

from anthropic import Anthropic, beta_tool
from pydantic import BaseModel
from show import ANSWER, KEY, MODEL, QUESTION, REPORT, SERVER, equal, show
from show import get_weather as look

client = Anthropic(base_url=SERVER, api_key=KEY, max_retries=0)
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


class Person(BaseModel):
    name: str
    age: int


@beta_tool
def get_weather(city: str) -> str:
    """Get the weather of a city.

    Args:
        city: The city's name.
    """
    return look(city)


def chat() -> None:
    message = client.messages.create(model=MODEL, max_tokens=1000, messages=HELLO, system="Be brief.")
    equal([block.text for block in message.content if block.type == "text"], [ANSWER])
    equal(message.stop_reason, "end_turn")


def stream() -> None:
    with client.messages.stream(model=MODEL, max_tokens=1000, messages=HELLO) as events:
        equal("".join(events.text_stream), ANSWER)
        assert events.get_final_message().usage.output_tokens > 0


def tools() -> None:
    question: list[Any] = [{"role": "user", "content": QUESTION}]
    runner = client.beta.messages.tool_runner(model=MODEL, max_tokens=1000, tools=[get_weather], messages=question)
    message = runner.until_done()
    equal([block.text for block in message.content if block.type == "text"], [REPORT])
    tool: Any = get_weather.to_dict()
    with client.messages.stream(
        model=MODEL, max_tokens=1000, tools=[tool], tool_choice={"type": "any"}, messages=question
    ) as events:
        (call,) = [block for block in events.get_final_message().content if block.type == "tool_use"]
    equal(call.input, {"city": "Paris"})


def structured_output() -> None:
    message = client.messages.parse(model=MODEL, max_tokens=1000, messages=HELLO, output_format=Person)
    equal(message.parsed_output, Person(name="Ada", age=36))


def token_counts() -> None:
    count = client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
    usage = client.messages.create(model=MODEL, max_tokens=5, messages=HELLO).usage
    equal(count, usage.input_tokens + (usage.cache_read_input_tokens or 0))


show(chat=chat, stream=stream, tools=tools, structured_output=structured_output, token_counts=token_counts)
