"""From the items of a response to the messages, tools and format of a chat."""

import uuid
from collections.abc import Iterable, Mapping
from reprlib import repr as brief
from typing import Any

from quire.engine.message_images import is_image
from quire.errors import RequestError
from quire.server.protocol import ChatCompletionRequest, JsonSchema, Message, ResponseFormat
from quire.server.responses.namespaces import flat_tools, joined
from quire.server.responses.protocol import ResponsesRequest, SamplingFields, TextFormat

Item = dict[str, Any]

SENT_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "json_schema.name": "text.format.name",
    "json_schema.schema": "text.format.schema",
    "function.name": "name",
    "function.parameters": "parameters",
}
"""Names of a chat's fields → where this endpoint's clients send them."""
WITH_LOGPROBS = "message.output_text.logprobs"
INCLUDES = {
    WITH_LOGPROBS,
    *("code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results"),
    *("message.input_image.image_url", "reasoning.encrypted_content"),
    *("web_search_call.action.sources", "web_search_call.results"),
}
"""Values of `include` that OpenAI knows. Most add parts of hosted tools' calls, which there are none of here."""
_HOSTED = ("web_search", "file_search", "code_interpreter", "image_generation", "mcp", "tool_search")
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
_NEEDED = {
    "message": ("role",),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id",),
}
"""Type of an item → its fields that are texts."""
_ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def to_chat(request: ResponsesRequest, history: Iterable[Item]) -> ChatCompletionRequest:
    """The chat that continues `history` with `request`. Raises `RequestError` for items and tools it does not know."""
    system = [Message(role="system", content=request.instructions)] if request.instructions else []
    passed_on = {name: getattr(request, name) for name in SamplingFields.__struct_fields__}
    with_logprobs = bool(request.top_logprobs) or WITH_LOGPROBS in (request.include or ())
    tools = [_tool(tool, place) for place, tool in flat_tools(request.tools or ()) if not is_hosted(tool)]
    choice = _tool_choice(request.tool_choice)
    return ChatCompletionRequest(
        model=request.model,
        messages=[*system, *to_messages(history)],
        max_completion_tokens=request.max_output_tokens,
        stream=request.stream,
        logprobs=with_logprobs,
        tools=tools or None,
        tool_choice=choice if tools or choice != "auto" else None,  # auto is the default, which clients may spell out
        response_format=_response_format(request.text.format if request.text is not None else None),
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
        **passed_on,
    )


def input_items(given: str | list[Item] | None) -> list[Item]:
    """The items of a request's `input`, each with its type and an id. Raises `RequestError` if there are none."""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not items:
        raise RequestError("input is empty; give a text or items", param="input")
    named = [{"type": "message", **item} for item in items]
    for index, item in enumerate(named):
        if not isinstance(item["type"], str):
            raise RequestError(f"input[{index}].type is {brief(item['type'])}; it is a text", param="input")
        if not item.get("id"):
            item["id"] = f"{_ID_PREFIXES.get(item['type'], 'item')}_{uuid.uuid4().hex}"
        if item["type"] == "message":  # listed again, every content is a list of parts
            kind = "output_text" if item.get("role") == "assistant" else "input_text"
            content = item.get("content")
            item["content"] = [{"type": kind, "text": content}] if isinstance(content, str) else content
            item.setdefault("status", "completed")
    return named


def to_messages(items: Iterable[Item]) -> list[Message]:
    """The messages of `items`. Reasoning, text and calls in a row are one message of the assistant."""
    messages: list[Message] = []
    for index, item in enumerate(items):
        match item:
            case {"type": "message", "role": str(role)}:
                content = _content(item.get("content"), f"input[{index}].content")
                if role == "assistant" and (last := _open_turn(messages)) is not None and last.content is None:
                    last.content = content
                else:
                    messages.append(Message(role=role, content=content))
            case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(arguments)}:
                function = {"name": joined(item.get("namespace"), name), "arguments": arguments}
                call = {"id": call_id, "type": "function", "function": function}
                turn = _open_turn(messages) or _new_turn(messages)
                turn.tool_calls = [*(turn.tool_calls or ()), call]
            case {"type": "function_call_output", "call_id": str(call_id)}:
                text = _text(item.get("output"), f"input[{index}].output")
                messages.append(Message(role="tool", content=text, tool_call_id=call_id))
            case {"type": "reasoning"}:
                parts = item.get("content") or item.get("summary") or ""
                turn = _new_turn(messages)
                turn.reasoning = _text(parts, f"input[{index}].content") or None
            case {"type": "message" | "function_call" | "function_call_output" as kind}:
                lacking = [name for name in _NEEDED[kind] if not isinstance(item.get(name), str)]
                raise RequestError(f"input[{index}] is a {kind} without {' and '.join(lacking)} as text", param="input")
            case _ if not is_hosted(item):
                raise RequestError(
                    f"input[{index}] is an item of type {brief(item.get('type'))}; supported are message, "
                    "function_call, function_call_output, reasoning and item_reference",
                    param="input",
                )
    return [message for message in messages if _says_something(message)]


def _says_something(message: Message) -> bool:
    """A turn of reasoning alone, cut off before its text, has nothing that a template could show."""
    return message.role != "assistant" or message.content is not None or bool(message.tool_calls)


def _open_turn(messages: list[Message]) -> Message | None:
    return messages[-1] if messages and messages[-1].role == "assistant" else None


def _new_turn(messages: list[Message]) -> Message:
    messages.append(Message(role="assistant"))
    return messages[-1]


def _content(content: object, place: str) -> str | list[dict[str, Any]]:
    """A text, or parts where some are images."""
    if not isinstance(content, list) or not any(map(is_image, content)):
        return _text(content, place)
    return [
        part if is_image(part) else {"type": "text", "text": _text([part], f"{place}[{index}]")}
        for index, part in enumerate(content)
    ]


def _text(content: object, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{place} is {brief(content)}; give a text or a list of parts", param="input")
    texts = []
    for part in content:
        match part:
            case {"type": kind} if kind in _TEXT_PARTS and isinstance(text := part.get("text", part.get(kind)), str):
                texts.append(text)
            case {"type": kind} if kind in _TEXT_PARTS:
                raise RequestError(f"{place} has a part of type {kind!r} without a text", param="input")
            case {"type": kind}:
                raise RequestError(
                    f"{place} has a part of type {brief(kind)}; only text and input_image are supported",
                    param="input",
                )
            case _:
                raise RequestError(f"{place} has a part without a type", param="input")
    return "\n".join(texts)


def is_reference(item: Item) -> bool:
    """Whether `item` stands for one of an earlier response. Its type may be left out."""
    kind = item.get("type", "item_reference")
    return kind in ("item_reference", None) and isinstance(item.get("id"), str) and "role" not in item


def is_hosted(tool: Mapping[str, Any]) -> bool:
    """Whether `tool`, or the call in an item, runs on OpenAI's servers. Clients send such tools by default, so none is
    refused."""
    kind = tool.get("type")
    return isinstance(kind, str) and kind.startswith(_HOSTED)


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A function, which Responses write flat, as chats write it."""
    if (kind := tool.get("type", "function")) != "function":
        raise RequestError(f"{place} is of type {brief(kind)}; function and namespace are supported", param="tools")
    if "function" in tool:
        return dict(tool)
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    match choice:
        case {"type": "function", "name": name, **rest}:
            return {"type": "function", "function": {"name": joined(rest.get("namespace"), name)}}
        case {"type": "allowed_tools", "mode": mode, "tools": tools}:
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
    return choice


def _response_format(wanted: TextFormat | None) -> ResponseFormat | None:
    if wanted is None or wanted.type != "json_schema":
        return ResponseFormat(type=wanted.type) if wanted is not None else None
    schema = JsonSchema(wanted.schema, wanted.name, wanted.description, wanted.strict)
    return ResponseFormat(type="json_schema", json_schema=schema)
