"""Tools for chat templates that know none: descriptions, calls and results as plain messages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INTRODUCTION = """You can call functions. Their descriptions:
{tools}
To call functions, answer with a JSON list and nothing else:
[{{"name": "function name", "arguments": {{"argument name": "value"}}}}]"""


def knows_tools(template: str) -> bool:
    """True if the chat template shows tools itself."""
    return "tools" in template


def with_plain_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The messages with tools described in the system message, and with calls and results as text."""
    plain = [_plain(message) for message in messages]
    if tools:
        listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
        text = _INTRODUCTION.format(tools=listed)
        if plain and plain[0].get("role") == "system" and isinstance(plain[0].get("content"), str):
            plain[0]["content"] = f"{plain[0]['content']}\n\n{text}"
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(message)
    if plain.get("role") == "tool":
        name = f" of {plain['name']}" if plain.get("name") else ""
        return {"role": "user", "content": f"Result{name}: {_text(plain.get('content'))}"}
    if calls := plain.pop("tool_calls", None):
        functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
        listed = [{"name": f.get("name"), "arguments": _arguments(f.get("arguments"))} for f in functions]
        text = json.dumps(listed, ensure_ascii=False)
        plain["content"] = f"{_text(plain['content'])}\n{text}" if plain.get("content") else text
    return plain


def _text(content: Any) -> str:
    """A message's content as one text."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _arguments(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
