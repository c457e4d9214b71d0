"""LangChain: the programs of langchain-openai, langchain-anthropic and langchain-ollama."""

from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from show import ANSWER, BASE_URL, KEY, MODEL, QUESTION, REPORT, SERVER, equal, get_weather, show

options: Any = {"model": MODEL, "base_url": BASE_URL, "api_key": KEY, "max_retries": 0}
model = ChatOpenAI(**options)
weather = tool(get_weather)


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def chat() -> None:
    equal(model.invoke("Hello").content, ANSWER)
    claude: Any = {"model": MODEL, "base_url": SERVER, "api_key": KEY, "max_retries": 0}
    equal(ChatAnthropic(**claude).invoke("Hello").content, ANSWER)
    equal(ChatOllama(model=MODEL, base_url=SERVER).invoke("Hello").content, ANSWER)


def stream() -> None:
    equal("".join(str(chunk.content) for chunk in model.stream("Hello")), ANSWER)


def tools() -> None:
    for choice in ("auto", "any", "get_weather"):
        bound = model.bind_tools([weather], tool_choice=choice)
        messages: list[Any] = [HumanMessage(QUESTION)]
        asked: Any = bound.invoke(messages)
        (call,) = asked.tool_calls
        result = weather.invoke(call)
        assert isinstance(result, ToolMessage)
        equal(model.bind_tools([weather]).invoke([*messages, asked, result]).content, REPORT)


async def structured_output() -> None:
    for method in ("json_schema", "function_calling"):
        structured = model.with_structured_output(Person, method=method)  # type: ignore[arg-type]  # a literal
        equal(await structured.ainvoke("Hello"), Person(name="Ada", age=36))


def embeddings() -> None:
    vectors = OpenAIEmbeddings(model=MODEL, base_url=BASE_URL, api_key=KEY, check_embedding_ctx_length=False)
    equal([len(vector) for vector in vectors.embed_documents(["one", "two words"])], [4, 4])


def completions() -> None:
    equal(OpenAI(**options).invoke("Hello"), ANSWER)


def responses() -> None:
    (block,) = ChatOpenAI(**options, use_responses_api=True).invoke("Hello").content_blocks
    equal(block["text"], ANSWER)


def overflow() -> None:
    try:
        model.invoke("word " * 300_000)
    except ContextOverflowError:
        return
    raise AssertionError("no ContextOverflowError")


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
