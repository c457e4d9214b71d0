"""Reads a call whose arguments stand between tags, and writes them as JSON while they come."""

import re

from quire.server.tools.arguments import as_json, property_schema
from quire.server.tools.format_types import JsonBody, TagBody, ToolFormat
from quire.server.tools.json_calls import read_json_calls
from quire.server.tools.scanner import MAX_HEADER_CHARS, Scan, Scanner
from quire.server.tools.sink import NotACallError, Sink
from quire.server.tools.tag_values import TagValues

_TYPE = re.compile(r'type="(\w+)"')


def read_tag_call(scan: Scanner, form: ToolFormat, body: TagBody, sink: Sink) -> Scan[None]:
    call_close, section_close = form.call[1].strip(), form.section[1].strip()
    key_open, end = body.key_open.strip(), body.end.strip()
    if body.name_open and not (yield from scan.accept(body.name_open)):
        raise NotACallError
    if not body.name_open and (yield from scan.peek()) == "{":  # no name: models of such families write JSON too
        yield from read_json_calls(scan, JsonBody(), sink)
        return
    parts: list[str] = []
    name_close = body.name_close.strip()
    quoted = name_close.startswith('"')
    name_close = '"' if quoted else name_close
    closers = tuple(mark for mark in (key_open, end, call_close, section_close) if mark)
    if body.prefix:  # all of them begin with it
        closers = (body.prefix,)
    stop = yield from scan.until((name_close or "\n", *closers), parts.append, MAX_HEADER_CHARS)
    if not stop:
        raise NotACallError
    if stop == name_close:
        scan.position += len(stop)
        if quoted and (yield from _attributes(scan, body)) is None:
            raise NotACallError
    # Where nothing but a name follows the first mark, only a tool's name tells a call from text.
    tool = sink.begin(_unescaped("".join(parts).strip(), body), known_only=not body.name_open)
    if body.whole[0] and (yield from scan.accept(body.whole[0])):
        yield from _whole(scan, body, sink)
        return
    sink.arguments("{")
    comma = ""
    root = tool.parameters if tool else {}
    values = TagValues(scan, body, sink, root, closers)
    while True:
        yield from scan.space()
        if (body.prefix and (yield from scan.at(f"{key_open}/"))) or not (yield from scan.accept(key_open)):
            break
        key, is_spelled = yield from _tag_key(scan, body)
        if not key:
            break
        sink.arguments(f"{comma}{as_json(key)}: ")
        comma = ", "
        if not (yield from values.value(key, property_schema(root, key), is_spelled=is_spelled)):
            sink.end()
            return
    sink.arguments("}")
    if end:
        yield from scan.accept(end)
    sink.end()


def _whole(scan: Scanner, body: TagBody, sink: Sink) -> Scan[None]:
    """All arguments as one JSON object, whose tag has been opened."""
    yield from _attributes(scan, body)
    yield from scan.space()
    if (yield from scan.peek()) == "{":
        yield from scan.json(sink.arguments)
    else:
        sink.arguments("{}")
    yield from scan.space()
    yield from scan.accept(body.whole[1])
    yield from scan.space()
    yield from scan.accept(body.end)
    sink.end()


def _attributes(scan: Scanner, body: TagBody) -> Scan[str | None]:
    """The rest of a tag; None if it does not end."""
    parts: list[str] = []
    if not (yield from scan.until((body.tag_end,), parts.append, MAX_HEADER_CHARS)):
        return None
    scan.position += len(body.tag_end)
    return "".join(parts)


def _unescaped(name: str, body: TagBody) -> str:
    return name.replace("&quot;", '"').replace("&amp;", "&") if body.escapes else name


def _is_spelled(attributes: str, body: TagBody) -> bool | None:
    """Whether the attributes of a key's tag say that its value is a text; None if they do not say."""
    if "{type}" in body.key_close:
        found = _TYPE.search(attributes)
        return found[1] == "string" if found else None
    return True if '"true"' in attributes else False if '"false"' in attributes else None


def _tag_key(scan: Scanner, body: TagBody) -> Scan[tuple[str, bool | None]]:
    """An argument's name, and whether its tag says that the value is a text."""
    parts: list[str] = []
    first, *others = [mark.strip() for mark in body.key_close.split("\n") if mark.strip()]
    quoted = first.startswith('"')
    stop = yield from scan.until(('"' if quoted else first,), parts.append, MAX_HEADER_CHARS)
    key, is_spelled = _unescaped("".join(parts).strip(), body), None
    if not stop:
        return "", None
    scan.position += len(stop)
    if quoted:
        attributes = yield from _attributes(scan, body)
        if attributes is None:
            return "", None
        is_spelled = _is_spelled(attributes, body)
    if body.type_tag[0]:
        yield from scan.space()
        if (yield from scan.accept(body.type_tag[0])):
            parts.clear()
            if not (yield from scan.until((body.type_tag[1],), parts.append, MAX_HEADER_CHARS)):
                return "", None
            scan.position += len(body.type_tag[1])
            is_spelled = True if "".join(parts).strip() == "string" else None
    for mark in others:
        yield from scan.space()
        yield from scan.accept(mark)
    return key, is_spelled
