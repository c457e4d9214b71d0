"""Reads a call that is a name, a mark and the arguments as JSON."""

import re

from quire.server.tools.format_types import HeaderBody, ToolFormat
from quire.server.tools.scanner import MAX_HEADER_CHARS, Scan, Scanner
from quire.server.tools.sink import NotACallError, Sink


def read_header_call(scan: Scanner, form: ToolFormat, body: HeaderBody, sink: Sink) -> Scan[None]:
    parts: list[str] = []
    middle, id_mark = body.middle.strip(), body.id_mark
    stops = (middle, "{", *((id_mark,) if id_mark else ()))
    stop = yield from scan.until(stops, parts.append, MAX_HEADER_CHARS)
    header, call_id = "".join(parts).strip(), ""
    if stop == id_mark and stop:
        scan.position += len(stop)
        parts.clear()
        stop = yield from scan.until((middle, "{"), parts.append, MAX_HEADER_CHARS)
        call_id = "".join(parts).strip()
    if not stop:
        raise NotACallError
    if stop == middle:
        scan.position += len(stop)
        yield from scan.space()
    if (yield from scan.peek()) != "{":
        raise NotACallError
    sink.begin(_name_in(header, body), header if form.id_style == "header" else call_id)
    yield from scan.json(sink.arguments)
    sink.end()


def _name_in(header: str, body: HeaderBody) -> str:
    """The name in a header; the parts around it may be missing."""
    before, _, after = body.header.partition("{name}")
    name = header.removeprefix(before)
    return re.sub(r":\d+$", "", name) if after else name
