"""Namespaces: functions that a client groups under one name. A chat knows them as NAMESPACE.FUNCTION."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quire.errors import RequestError

Json = Mapping[str, Any]


def flat_tools(tools: Iterable[Json]) -> Iterator[tuple[str, Json]]:
    """(place in the request, tool) of each tool, those of namespaces with their joined names. Raises `RequestError`
    for a namespace without name or tools."""
    for index, tool in enumerate(tools):
        if tool.get("type") != "namespace":
            yield f"tools[{index}]", tool
            continue
        match tool:
            case {"name": str(namespace), "tools": [*members]} if all(isinstance(each, Mapping) for each in members):
                for number, member in enumerate(members):
                    yield f"tools[{index}].tools[{number}]", {**member, "name": joined(namespace, member.get("name"))}
            case _:
                raise RequestError(f"tools[{index}] is a namespace; it needs a name and a list of tools", param="tools")


def joined(namespace: object, name: object) -> object:
    """The name by which a chat knows the function of a namespace; `name` itself outside of any."""
    return f"{namespace}.{name}" if namespace and isinstance(name, str) else name


def split(name: str, tools: Iterable[Json]) -> dict[str, str]:
    """`name` of a call, and `namespace` if it is one of the client's."""
    for tool in tools:
        if tool.get("type") == "namespace" and name.startswith(f"{tool.get('name')}."):
            namespace = str(tool["name"])
            return {"namespace": namespace, "name": name.removeprefix(f"{namespace}.")}
    return {"name": name}
