"""A client's tools: from the fields tools, tool_choice and parallel_tool_calls to one checked `ToolUse`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as brief
from typing import Any

from quire.errors import RequestError

MAX_TOOLS = 512
_NAME = re.compile(r"[\w.:/-]{1,128}")
_MODES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that the model may call."""

    name: str
    parameters: Mapping[str, Any]
    """The JSON schema of its arguments, which are an object."""
    strict: bool = False
    """Arguments follow the schema in every call, not only in a forced one."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request, and how the model may use them."""

    tools: tuple[Tool, ...]
    forced: bool = False
    """The reply is a call and nothing else."""
    named: bool = False
    """The client named the only tool to call."""
    parallel: bool = True
    """A reply may hold more than one call."""

    def find(self, name: str) -> Tool | None:
        """The tool called `name`."""
        return next((tool for tool in self.tools if tool.name == name), None)


def read_tools(tools: Sequence[Any] | None, choice: Any, *, parallel: bool | None = None) -> ToolUse | None:
    """The tools of a request in the format of OpenAI's chats; None if the model must not call any.

    `choice` is none, auto, required, {"type": "function", "function": {"name": …}} or {"type": "allowed_tools", …}.
    Raises `RequestError`, naming the field, for tools or a choice that cannot be.
    """
    if not tools:
        if choice not in (None, "none"):
            shown = f"is {brief(choice)}" if isinstance(choice, str) else "names a tool"
            raise RequestError(
                f"tool_choice {shown} and there are no tools; give tools, or leave it out",
                param="tool_choice",
            )
        return None
    check_count(tools)
    use = ToolUse(tuple(_tool(tool, index) for index, tool in enumerate(tools)), parallel=parallel is not False)
    names = [tool.name for tool in use.tools]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"tools holds {name!r} twice; names must differ", param="tools")
    return _choose(use, choice)


def check_count(tools: Sequence[Any]) -> None:
    """Raise `RequestError` for more tools than a request may have; those of a namespace count each."""
    count = len(tools)
    if count <= MAX_TOOLS:
        spaces = [tool.get("tools") for tool in tools if isinstance(tool, Mapping) and tool.get("type") == "namespace"]
        count += sum(len(members) - 1 for members in spaces if isinstance(members, list))
    if count > MAX_TOOLS:
        raise RequestError(f"tools holds {count} tools; at most {MAX_TOOLS} are allowed", param="tools")


def _choose(use: ToolUse, choice: Any) -> ToolUse | None:
    match choice:
        case None | "auto":
            return use
        case "none":
            return None
        case "required":
            return replace(use, forced=True)
        case {"type": "function", "function": {"name": str(name)}}:
            return replace(use, tools=(_named(use, name),), forced=True, named=True, parallel=False)
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [_, *_] as allowed},
        }:
            names = dict.fromkeys(_allowed_name(entry) for entry in allowed)
            return replace(use, tools=tuple(_named(use, name) for name in names), forced=mode == "required")
    raise RequestError(
        f"tool_choice is {brief(choice)}; it is one of {', '.join(_MODES)}, or names a function as "
        '{"type": "function", "function": {"name": "…"}}',
        param="tool_choice",
    )


def _allowed_name(entry: Any) -> str:
    match entry:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
    raise RequestError(
        f"tool_choice.allowed_tools.tools holds {brief(entry)}; an entry names a function", param="tool_choice"
    )


def _named(use: ToolUse, name: str) -> Tool:
    tool = use.find(name)
    if tool is None:
        raise RequestError(
            f"tool_choice names {name[:200]!r}, which is not among the tools: "
            + ", ".join(tool.name for tool in use.tools[:20]),
            param="tool_choice",
        )
    return tool


def _tool(tool: Any, index: int) -> Tool:
    place = f"tools[{index}]"
    if not isinstance(tool, Mapping):
        raise RequestError(f"{place} is {brief(tool)}; a tool is an object", param="tools")
    if (kind := tool.get("type", "function")) != "function":
        raise RequestError(f"{place} is of type {brief(kind)}; only function is supported", param="tools")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise RequestError(f"{place}.function is {brief(function)}; it is an object with a name", param="tools")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{place}.function.name is {brief(name)}; it is 1 to 128 letters, digits or characters of _ . : / -",
            param="tools",
        )
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise RequestError(f"{place}.function.parameters is {brief(parameters)}; it is a JSON schema", param="tools")
    if parameters.get("type", "object") != "object":
        raise RequestError(
            f"{place}.function.parameters describes {brief(parameters['type'])}; arguments are an object", param="tools"
        )
    if not isinstance(function.get("description") or "", str):
        raise RequestError(f"{place}.function.description is no text", param="tools")
    return Tool(name, parameters, bool(function.get("strict")))
