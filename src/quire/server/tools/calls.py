"""Reads tool calls as a format's row describes them. The calls reach a sink while they are read.

A function here is a scan (see `scanner`). It raises `NotACallError` for text that is no call, as long as no call has
begun.
"""

from quire.server.tools.braced_call import read_braced_call
from quire.server.tools.format_types import BracedBody, HeaderBody, JsonBody, PythonBody, TagBody, ToolFormat
from quire.server.tools.header_call import read_header_call
from quire.server.tools.json_calls import read_json_calls
from quire.server.tools.python_calls import read_python_calls
from quire.server.tools.scanner import Scan, Scanner
from quire.server.tools.sink import NotACallError, Sink
from quire.server.tools.tag_call import read_tag_call


def read_calls(scan: Scanner, form: ToolFormat, sink: Sink) -> Scan[None]:
    """All calls from an opener on, or from the place where a bare call may stand."""
    section_open, section_close = (mark.strip() for mark in form.section)
    call_open, call_close = (mark.strip() for mark in form.call)
    in_section = False
    for mark in (section_open, *(mark.strip() for mark in form.also_opens if not _opens_body(form, mark))):
        in_section = in_section or (bool(mark) and (yield from scan.accept(mark)))
    yield from scan.space()
    begun = False
    while True:
        start = scan.pin()
        try:
            if call_open and (yield from scan.accept(call_open)):
                yield from scan.space()
            yield from _read_body(scan, form, sink)
        except NotACallError:
            if not begun:
                raise
            scan.back_to(start)
            return
        begun = True
        yield from scan.space()
        if call_close and (yield from scan.accept(call_close)):
            yield from scan.space()
        if form.separators and (yield from scan.peek()) in tuple(form.separators):
            scan.position += 1
            yield from scan.space()
            continue
        if in_section and section_close and (yield from scan.accept(section_close)):
            return
        if not (yield from _another(scan, form, call_open, in_section=in_section)):
            return


def _opens_body(form: ToolFormat, mark: str) -> bool:
    return isinstance(form.body, TagBody) and bool(form.body.name_open) and form.body.name_open.startswith(mark)


def _another(scan: Scanner, form: ToolFormat, call_open: str, *, in_section: bool) -> Scan[bool]:
    if call_open:
        return (yield from scan.at(call_open))
    match form.body:
        case TagBody(name_open=name_open):
            return (yield from scan.at(name_open))
        case PythonBody(bracketed=False):
            return in_section and bool((yield from scan.peek()))
        case _:
            return False


def _read_body(scan: Scanner, form: ToolFormat, sink: Sink) -> Scan[None]:
    match form.body:
        case JsonBody() as body:
            yield from read_json_calls(scan, body, sink)
        case HeaderBody() as body:
            yield from read_header_call(scan, form, body, sink)
        case TagBody() as body:
            yield from read_tag_call(scan, form, body, sink)
        case PythonBody() as body:
            yield from read_python_calls(scan, body, sink)
        case BracedBody() as body:
            yield from read_braced_call(scan, form, body, sink)
