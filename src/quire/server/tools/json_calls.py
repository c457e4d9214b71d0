"""Reads calls that are JSON objects: one, or a list."""

import json
from typing import Any

from quire.server.tools.format_types import JsonBody
from quire.server.tools.scanner import Scan, Scanner
from quire.server.tools.sink import NotACallError, Sink

_KEYS_OF_ARGUMENTS = ("arguments", "parameters", "args", "input")
_KEYS_OF_ID = ("id", "tool_call_id", "call_id")


def read_json_calls(scan: Scanner, body: JsonBody, sink: Sink) -> Scan[None]:
    """One object, or a list of objects."""
    if not (yield from scan.accept("[")):
        yield from _json_call(scan, body, sink)
        return
    begun = False
    while True:
        yield from scan.space()
        start = scan.pin()
        try:
            yield from _json_call(scan, body, sink)
        except NotACallError:
            if not begun:
                raise
            scan.back_to(start)
            return
        begun = True
        yield from scan.space()
        if not (yield from scan.accept(",")):
            yield from scan.accept("]")
            return


class _JsonCall:
    """What is known of a call while its object is read."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.name = ""
        self.id = ""
        self.held: str | None = None
        """Arguments that came before the name."""
        self.begun = False

    def begin(self) -> None:
        self.sink.begin(self.name, self.id)
        self.begun = True


def _json_call(scan: Scanner, body: JsonBody, sink: Sink) -> Scan[None]:
    if not (yield from scan.accept("{")):
        raise NotACallError
    call = _JsonCall(sink)
    if not (yield from _json_fields(scan, body, call)) and not call.begun:
        raise NotACallError
    if not call.begun:
        if not call.name:
            raise NotACallError
        call.begin()
        sink.arguments(call.held or "{}")
    sink.end()


def _json_fields(scan: Scanner, body: JsonBody, call: _JsonCall) -> Scan[bool]:
    """The fields of a call's object up to its closing brace. Returns False if the text ends, or is no JSON, before."""
    while True:
        yield from scan.space()
        if (yield from scan.accept("}")):
            return True
        if (yield from scan.accept(",")):
            continue
        if (yield from scan.peek()) != '"':
            return False
        key = yield from _json_value(scan)
        yield from scan.space()
        if not isinstance(key, str) or not (yield from scan.accept(":")):
            return False
        yield from scan.space()
        if not (yield from _json_field(scan, body, call, key)):
            return False


def _json_field(scan: Scanner, body: JsonBody, call: _JsonCall, key: str) -> Scan[bool]:
    first = yield from scan.peek()
    if body.keyed and first == "{" and not call.name:
        call.name = key
        call.begin()
        return (yield from scan.json(call.sink.arguments))
    if key in (body.name_key, "name", "function") and first == '"':
        value = yield from _json_value(scan)
        call.name = value if isinstance(value, str) and not call.name else call.name
        return bool(call.name)
    if key == "function" and first == "{":
        scan.position += 1
        return (yield from _json_fields(scan, body, call))
    if key in (body.arguments_key, *_KEYS_OF_ARGUMENTS):
        return (yield from _json_arguments(scan, call))
    if key in (body.id_key, *_KEYS_OF_ID):
        value = yield from _json_value(scan)
        call.id = value if isinstance(value, str) else ""
        return value is not None
    if key != "type" and not call.begun:
        raise NotACallError
    return (yield from _json_value(scan)) is not None


def _json_arguments(scan: Scanner, call: _JsonCall) -> Scan[bool]:
    first = yield from scan.peek()
    if first == "{" and call.name and not call.begun:
        call.begin()
        return (yield from scan.json(call.sink.arguments))
    parts: list[str] = []
    complete = yield from scan.json(parts.append)
    text = "".join(parts)
    if first == '"':
        text = _unquoted(text)  # some models write the arguments as JSON within a string
    if not call.begun:
        call.held = "{}" if text in ("", "null") else text
    return complete


def _json_value(scan: Scanner) -> Scan[Any]:
    """The next value; None if the text ends before it does, or for null."""
    parts: list[str] = []
    if not (yield from scan.json(parts.append)):
        return None
    try:
        return json.loads("".join(parts))
    except (ValueError, RecursionError):
        return None


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text
