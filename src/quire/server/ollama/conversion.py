"""From Ollama's requests to a chat or a completion."""

from collections.abc import Sequence
from reprlib import repr as brief
from typing import Any

import msgspec

from quire.errors import RequestError
from quire.server.ollama.protocol import (
    ChatRequest,
    GenerateRequest,
    GenerationFields,
    OllamaMessage,
    Options,
    ToolCall,
)
from quire.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    ResponseFormat,
    StructuredOutputs,
)
from quire.server.protocol import GenerateRequest as SharedFields

SENT_NAMES = {
    "max_completion_tokens": "options.num_predict",
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "structured_outputs": "format",
    "response_format": "format",
    "reasoning_effort": "think",
    **{name: f"options.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "seed", "stop")},
    **{name: f"options.{name}" for name in ("presence_penalty", "frequency_penalty")},
}
"""Names of a chat's fields → where this endpoint's clients send them."""
_SAME = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")


def to_chat(request: GenerationFields) -> ChatCompletionRequest:
    """The chat for `request`; a prompt of /api/generate is its user's message."""
    if isinstance(request, ChatRequest):
        messages, tools = [_message(m, index) for index, m in enumerate(request.messages or ())], request.tools
    else:
        assert isinstance(request, GenerateRequest)
        system = [Message(role="system", content=request.system)] if request.system else []
        content = with_images(request.prompt or "", request.images)
        messages, tools = [*system, Message(role="user", content=content)], None
    chat = ChatCompletionRequest(messages=messages, tools=tools or None)
    _set_fields(chat, request)
    chat.logprobs, chat.top_logprobs = bool(request.logprobs), request.top_logprobs
    if request.think is not None:
        is_on = request.think is not False
        chat.chat_template_kwargs = {"enable_thinking": is_on, "thinking": is_on}
        chat.include_reasoning = is_on
        if isinstance(request.think, str):
            chat.reasoning_effort = request.think
    return chat


def to_completion(request: GenerateRequest) -> CompletionRequest:
    """The completion for a request with `raw`."""
    completion = CompletionRequest(prompt=request.prompt or "", suffix=request.suffix, logprobs=request.top_logprobs)
    _set_fields(completion, request)
    return completion


def asks_for_nothing(request: GenerationFields) -> bool:
    """Clients load and unload models with a request that has no prompt."""
    return not (request.messages if isinstance(request, ChatRequest) else getattr(request, "prompt", None))


def _set_fields(chat: SharedFields, request: GenerationFields) -> None:
    chat.model, chat.stream = request.model, request.stream is not False
    options = request.options or Options()
    for name in _SAME:
        setattr(chat, name, getattr(options, name))
    chat.repetition_penalty = options.repeat_penalty
    if options.num_predict is not None and options.num_predict > 0:
        chat.max_tokens = options.num_predict
    match request.format:
        case None | "":
            pass
        case "json":
            chat.response_format = ResponseFormat("json_object")
        case dict(schema):
            chat.structured_outputs = StructuredOutputs(json=schema)
        case other:
            raise RequestError(f'format is {brief(other)}; it is "json" or a JSON schema', param="format")


def _message(message: OllamaMessage, index: int) -> Message:
    calls = [_call(call, f"call_{index}_{number}") for number, call in enumerate(message.tool_calls or ())]
    return Message(
        role=message.role,
        content=with_images(message.content or "", message.images) or (None if calls else ""),
        name=message.tool_name or None,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id or None,
        reasoning=message.thinking or None,
    )


def with_images(
    content: str | None, images: Sequence[str] | msgspec.UnsetType | None
) -> str | list[dict[str, Any]] | None:
    """A text, and the images before it, as Ollama orders them."""
    if not images:
        return content
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images
    ]
    return [*parts, {"type": "text", "text": content}] if content else parts


def _call(call: ToolCall, call_id: str) -> dict[str, object]:
    given = call.function.arguments
    arguments = msgspec.json.encode({} if given is msgspec.UNSET else given).decode()
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or call_id, "type": "function", "function": function}
