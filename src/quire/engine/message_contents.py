"""The contents of messages in the form that a chat template takes: a text or a list of parts.

transformers hands contents to the template as they came. A template that knows one form only then writes a list as
Python prints it, or fails. Quire asks the template first, with a short conversation for each role:

- A list of text parts is passed as a list if the template writes the texts of a list, as in transformers; else the
  texts are joined by line feeds, as in vLLM.
- A text is passed as a list of one part if the template writes only those.
- A part that stands for an image is passed on in a list; where texts are joined its marker goes among them.
- Fields that are None are left out, as in transformers; a template that fails without the content of an assistant's
  message gets an empty text. The names of a message's reasoning are filled from each other, as in transformers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.errors import RequestError
from quire.image_input import IMAGE_PART

Render = Callable[[list[dict[str, Any]]], str]
"""Renders messages; raises what a template raises."""

_PROBE = "quireprobe"
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; templates read the first, gpt-oss's the second."""
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a part that is a text, in chats or responses → the field with the text."""
_QUESTION = {"role": "user", "content": "a"}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}
_AROUND: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "system": ([], [_QUESTION]),
    "user": ([], []),
    "assistant": ([_QUESTION], []),
    "tool": ([_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}], []),
}
"""Role → what comes before and after its message in the conversation that asks."""


@dataclass(frozen=True, slots=True)
class _Form:
    texts: bool
    parts: bool


class ContentForms:
    """What one template takes, by role; asked when a role first appears."""

    def __init__(self) -> None:
        self._of_role: dict[str, _Form] = {}

    def shape(self, render: Render, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its content in a form that the template takes."""
        content = message.get("content")
        if content is None:
            return message
        form = self._form(render, message["role"])
        if isinstance(content, list):
            if form.parts:
                return {**message, "content": [_without_marker(part) for part in content]}
            return {**message, "content": "\n".join(part.get("text", part.get("marker")) for part in content)}
        wraps = form.parts and not form.texts
        return {**message, "content": [{"type": "text", "text": content}]} if wraps else message

    def _form(self, render: Render, role: str) -> _Form:
        role = role if role in _AROUND else "user"
        if role not in self._of_role:
            self._of_role[role] = _Form(_writes(render, role, _PROBE), _writes(render, role, [_part(_PROBE)]))
        return self._of_role[role]


def render_contents(render: Render, messages: Sequence[dict[str, Any]], forms: ContentForms) -> str:
    """Render plain messages in the forms that the template takes. Raises what the template raises."""
    shaped = [forms.shape(render, message) for message in messages]
    if all("content" in message for message in shaped):
        return render(shaped)
    try:
        return render(shaped)
    except Exception:
        return render([{"content": "", **message} for message in shaped])


def plain_message(message: object, index: int) -> dict[str, Any]:
    """A message as `render_contents` takes it: its content is a text, a list of text parts, or left out of an
    assistant's message; arguments of tool calls are objects. Raises `RequestError` for what is none of these."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{index}] is no object with a role", param="messages")
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    content = plain.get("content")
    if isinstance(content, list):
        thoughts, content = _thoughts_apart(content, index)
        if thoughts and reasoning is None:
            plain |= dict.fromkeys(("thinking", "reasoning_content"), thoughts)
        plain["content"] = [
            part if isinstance(part, Mapping) and "marker" in part else _part(_text_of_part(part, index))
            for part in content
        ]
    elif content is None:
        if message["role"] != "assistant":
            raise RequestError(f"messages[{index}] has no content", param="messages")
    elif not isinstance(content, str):
        raise RequestError(
            f"messages[{index}].content is a {type(content).__name__}; give a text or a list of text parts",
            param="messages",
        )
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_tool_call(call) for call in plain["tool_calls"]]
    return plain


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _without_marker(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": IMAGE_PART} if "marker" in part else part


def _writes(render: Render, role: str, content: Any) -> bool:
    """Whether the template writes a text or a list of one part as its text, without quotes around it."""
    before, after = _AROUND[role]
    try:
        text = render([*before, {"role": role, "content": content}, *after])
    except Exception:
        return False
    return _PROBE in text and f"'{_PROBE}'" not in text and (isinstance(content, str) or f'"{_PROBE}"' not in text)


def _thoughts_apart(parts: list[Any], index: int) -> tuple[str, list[Any]]:
    """The reasoning among the parts of a message, as Mistral's and Anthropic's clients keep it, and the other parts."""
    thoughts, others = list[str](), list[Any]()
    for part in parts:
        match part:
            case {"type": "thinking", "thinking": str(text)}:
                thoughts.append(text)
            case {"type": "thinking", "thinking": list(texts)}:
                thoughts += [_text_of_part(text, index) for text in texts]
            case _:
                others.append(part)
    return "".join(thoughts), others


def _text_of_part(part: object, index: int) -> str:
    match part:
        case {"type": str(kind), **fields} if (name := _TEXTS.get(kind)) is not None:
            if isinstance(text := fields.get(name), str):
                return text
            raise RequestError(
                f"messages[{index}].content has a part of type {kind!r} without a {name}", param="messages"
            )
        case {"type": kind}:
            raise RequestError(
                f"messages[{index}].content has a part of type {kind!r}; only text parts are supported",
                param="messages",
            )
    raise RequestError(f"messages[{index}].content has a part without a type", param="messages")


def _plain_tool_call(call: Any) -> Any:
    """Parse arguments, which OpenAI sends as JSON in a string: a template's `tojson` would quote the string again."""
    match call:
        case {"function": {"arguments": str(arguments)}}:
            try:
                return {**call, "function": {**call["function"], "arguments": json.loads(arguments or "{}")}}
            except (ValueError, RecursionError):
                return call
    return call
