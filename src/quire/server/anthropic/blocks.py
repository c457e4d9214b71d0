"""From Anthropic's content blocks, tools and options to the request of a chat."""

from reprlib import repr as brief
from typing import Any

import msgspec

from quire.errors import RequestError
from quire.server.anthropic.protocol import InputMessage, MessagesRequest, PromptFields, Tool, ToolChoice
from quire.server.protocol import ChatCompletionRequest, JsonSchema, Message, ResponseFormat

Block = dict[str, Any]

SENT_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "user": "metadata.user_id",
    "function.name": "name",
    "function.parameters": "input_schema",
}
"""Names of a chat's fields → where this endpoint's clients send them."""
_BILLING = "x-anthropic-billing-header:"
"""Begins a system block of Claude Code that differs in each request: no prompt would be found in the prefix cache."""
_HOSTED = ("web_search_", "web_fetch_", "code_execution_", "tool_search_", "mcp_")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_MAX_USER_CHARS = 256
_NEEDED = {
    "text": "text as a text",
    "image": "source",
    "thinking": "thinking as a text",
    "tool_use": "id and name as texts, and input as an object",
    "tool_result": "tool_use_id as a text",
    "search_result": "content as a list of blocks",
}
"""Type of a block → what it needs."""


def to_chat(request: PromptFields) -> ChatCompletionRequest:
    """The chat for `request`. Raises `RequestError` for blocks, tools and options that it does not know."""
    tools = [_tool(tool, index) for index, tool in enumerate(request.tools or ()) if not is_hosted(tool)]
    choice = _tool_choice(request.tool_choice)
    if request.tool_choice is not None and not tools and choice not in ("auto", "none"):
        raise RequestError(
            f"tool_choice.type is {request.tool_choice.type!r} and there are no tools; give tools, or leave it out",
            param="tool_choice",
        )
    chat = ChatCompletionRequest(
        model=request.model,
        messages=[*_system(request.system), *(m for i, given in enumerate(request.messages) for m in _split(given, i))],
        tools=tools or None,
        tool_choice=choice if tools or choice != "auto" else None,  # auto is the default, which clients may spell out
        parallel_tool_calls=not (request.tool_choice and request.tool_choice.disable_parallel_tool_use),
    )
    last = chat.messages[-1] if request.messages else None
    if last is not None and last.role == "assistant" and last.content and not last.tool_calls:
        chat.continue_final_message = True  # Anthropic's models go on with a text put into their mouth
    _set_options(chat, request)
    if isinstance(request, MessagesRequest):
        for name in ("max_tokens", "temperature", "top_p", "top_k", "stream"):
            setattr(chat, name, getattr(request, name))
        chat.stop = request.stop_sequences
        if request.metadata is not None and request.metadata.user_id:
            chat.user = request.metadata.user_id[:_MAX_USER_CHARS]
    return chat


def _set_options(chat: ChatCompletionRequest, request: PromptFields) -> None:
    match request.thinking:
        case None:
            pass
        case thinking if thinking.type in ("enabled", "adaptive", "disabled"):
            if thinking.type != "adaptive":
                is_on = thinking.type == "enabled"
                chat.chat_template_kwargs = {"enable_thinking": is_on, "thinking": is_on}
            if thinking.budget_tokens is not None and thinking.budget_tokens < 1:
                raise RequestError(
                    f"thinking.budget_tokens is {thinking.budget_tokens}; it must be 1 or more", param="thinking"
                )
            chat.thinking_token_budget = thinking.budget_tokens
        case thinking:
            raise RequestError(
                f"thinking.type is {brief(thinking.type)}; supported: enabled, adaptive, disabled", param="thinking"
            )
    config = request.output_config
    if config is not None:
        chat.reasoning_effort = config.effort
        if config.format is not None:
            if config.format.type != "json_schema" or config.format.schema is None:
                raise RequestError(
                    f"output_config.format is of type {brief(config.format.type)}; it is of type json_schema and has a "
                    "schema",
                    param="output_config.format",
                )
            chat.response_format = ResponseFormat("json_schema", JsonSchema(config.format.schema, "output"))


def _system(system: str | list[Block] | None) -> list[Message]:
    if not system:
        return []
    blocks = [system] if isinstance(system, str) else [_text(block, f"system[{i}]") for i, block in enumerate(system)]
    text = "\n".join(block for block in blocks if not block.startswith(_BILLING))
    return [Message(role="system", content=text)] if text else []


def _split(message: InputMessage, index: int) -> list[Message]:
    """One message as messages of a chat. Each tool result becomes its own message, before the user's text."""
    if message.role not in ("user", "assistant", "system"):
        raise RequestError(
            f"messages[{index}].role is {brief(message.role)}; supported: user, assistant, system", param="messages"
        )
    if isinstance(message.content, str):
        return [Message(role=message.role, content=message.content)]
    results: list[Message] = []
    parts: list[Block] = []
    calls: list[dict[str, Any]] = []
    turn = Message(role=message.role)
    for number, block in enumerate(message.content):
        place = f"messages[{index}].content[{number}]"
        match block:
            case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict(given)}:
                function = {"name": name, "arguments": msgspec.json.encode(given).decode()}
                calls.append({"id": call_id, "type": "function", "function": function})
            case {"type": "tool_result", "tool_use_id": str(call_id)}:
                content = _result(block.get("content") or "", f"{place}.content")
                results.append(Message(role="tool", content=content, tool_call_id=call_id))
            case {"type": "thinking", "thinking": str(text)}:
                turn.reasoning = (turn.reasoning or "") + text
            case {"type": "redacted_thinking"}:
                pass
            case {"type": str(kind)} if is_hosted_block(kind):
                pass
            case _:
                parts.append(_part(block, place))
    if not parts and not calls and results:
        return results
    turn.content = _joined(parts) if parts or not calls else None
    turn.tool_calls = calls or None
    return [*results, turn]


def _result(content: object, place: str) -> str | list[Block]:
    """The content of a tool's result."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{place} is {brief(content)}; give a text or a list of blocks", param="messages")
    return _joined([_part(block, f"{place}[{index}]") for index, block in enumerate(content)])


def _joined(parts: list[Block]) -> str | list[Block]:
    """Texts as one, parts with images as they are."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(block: object, place: str) -> Block:
    """A block of text or an image as a part of a chat's message."""
    match block:
        case {"type": "image", "source": {"type": "base64", "data": str(data), **rest}}:
            kind = rest.get("media_type", "image/png")
            return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
        case {"type": "image", "source": {"type": "url", "url": str(url)}}:
            return {"type": "image_url", "image_url": {"url": url}}
        case {"type": "image"}:
            raise RequestError(
                f"{place} is an image whose source is neither base64 with data nor url with url", param="messages"
            )
    return {"type": "text", "text": _text(block, place)}


def _text(block: object, place: str) -> str:
    param = place.partition("[")[0]
    match block:
        case {"type": "text", "text": str(text)} | {"type": "compaction", "content": str(text)}:
            return text
        case {"type": "document", "source": {"type": "text", "data": str(text)}}:
            return text
        case {"type": "document", "source": {"type": "content", "content": str() | list() as content}}:
            return _texts(content, f"{place}.source.content")
        case {"type": "search_result", "content": list(content), **fields}:
            heads = [head for name in ("title", "source") if isinstance(head := fields.get(name), str)]
            return "\n".join([*heads, _texts(content, f"{place}.content")])
        case {"type": "document"}:
            raise RequestError(f"{place} is a document whose source is no text; only texts are supported", param=param)
        case {"type": str(kind)} if kind in _NEEDED:
            raise RequestError(f"{place} is a block of type {kind!r} without {_NEEDED[kind]}", param=param)
        case {"type": str(kind)}:
            raise RequestError(
                f"{place} is a block of type {kind!r}; supported are {', '.join(_NEEDED)} and document", param=param
            )
    raise RequestError(f"{place} is {brief(block)}; a block is an object with a type", param=param)


def _texts(content: str | list[object], place: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text(block, f"{place}[{index}]") for index, block in enumerate(content))


def is_hosted_block(kind: str) -> bool:
    """Whether a block of this type is a call of a tool on Anthropic's servers, or its result."""
    return kind.startswith(("server_tool_use", "mcp_tool_")) or kind.endswith("_tool_result")


def hosted_types(request: PromptFields) -> list[str]:
    """Types of the tools that run on Anthropic's servers, and of the blocks that tell of them."""
    contents = [message.content for message in request.messages if isinstance(message.content, list)]
    kinds = [block.get("type") for content in contents for block in content]
    tools = {str(tool.type) for tool in request.tools or () if is_hosted(tool)}
    return sorted(tools.union(kind for kind in kinds if isinstance(kind, str) and is_hosted_block(kind)))


def is_hosted(tool: Tool) -> bool:
    """Whether `tool` runs on Anthropic's servers. Clients send such tools by default, so none is refused."""
    return (tool.type or "").startswith(_HOSTED)


def _tool(tool: Tool, index: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise RequestError(
            f"tools[{index}] is of type {brief(tool.type)}; only custom is supported",
            param="tools",
        )
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema or {"type": "object"}}
    if tool.description:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    match choice:
        case None:
            return None
        case ToolChoice("tool", str(name)):
            return {"type": "function", "function": {"name": name}}
        case ToolChoice(kind) if kind in _CHOICES:
            return _CHOICES[kind]
    raise RequestError(
        f"tool_choice.type is {brief(choice.type)}; supported: auto, any, none, tool with a name", param="tool_choice"
    )
