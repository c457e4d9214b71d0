"""Tools for chat templates that know none: descriptions, calls and results as plain messages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INTRODUCTION = "You can call functions. Their descriptions:"
_INSTRUCTION = """To call functions, answer with a JSON list and nothing else:
[{"name": "function name", "arguments": {"argument name": "value"}}]"""


def with_plain_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, template: str
) -> tuple[list[dict[str, Any]], Sequence[Mapping[str, Any]] | None]:
    """Messages and tools for a chat template.

    If the template shows no calls, calls and results become text. If it shows no tools, the system message describes
    them.
    """
    shows_calls = "tool_calls" in template
    plain = [dict(message) if shows_calls else _plain(message) for message in messages]
    if tools and "tools" not in template:
        listed = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
        text = "\n".join([_INTRODUCTION, *listed, *(() if shows_calls else (_INSTRUCTION,))])
        tools = None
        if plain and plain[0].get("role") == "system" and isinstance(plain[0].get("content"), str):
            plain[0]["content"] = f"{plain[0]['content']}\n\n{text}"
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain, tools


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
