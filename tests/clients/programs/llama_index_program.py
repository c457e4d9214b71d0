"""LlamaIndex: the programs of its OpenAI-like integrations."""

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from show import ANSWER, BASE_URL, KEY, MODEL, QUESTION, REPORT, equal, get_weather, show

model = OpenAILike(
    model=MODEL,
    api_base=BASE_URL,
    api_key=KEY,
    max_retries=0,
    context_window=100_000,
    is_chat_model=True,
    is_function_calling_model=True,
)
HELLO = [ChatMessage(role="user", content="Hello")]


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def chat() -> None:
    equal(model.chat(HELLO).message.content, ANSWER)


def stream() -> None:
    equal("".join(part.delta or "" for part in model.stream_chat(HELLO)), ANSWER)


def tools() -> None:
    tool = FunctionTool.from_defaults(get_weather)
    reply = model.chat_with_tools([tool], user_msg=QUESTION)
    (call,) = model.get_tool_calls_from_response(reply)
    result = ChatMessage(role="tool", content=get_weather(**call.tool_kwargs), tool_call_id=call.tool_id)
    history = [ChatMessage(role="user", content=QUESTION), reply.message, result]
    equal(model.chat_with_tools([tool], chat_history=history).message.content, REPORT)


def structured_output() -> None:
    equal(model.as_structured_llm(Person).complete("Hello").raw, Person(name="Ada", age=36))


def embeddings() -> None:
    vectors = OpenAILikeEmbedding(model_name=MODEL, api_base=BASE_URL, api_key=KEY)
    equal([len(vector) for vector in vectors.get_text_embedding_batch(["one", "two words"])], [4, 4])


def completions() -> None:
    plain = OpenAILike(model=MODEL, api_base=BASE_URL, api_key=KEY, max_retries=0, context_window=100_000)
    equal(plain.complete("Hello").text, ANSWER)


show(
    chat=chat,
    stream=stream,
    tools=tools,
    structured_output=structured_output,
    embeddings=embeddings,
    completions=completions,
)
