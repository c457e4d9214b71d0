"""Reads gpt-oss's replies (harmony): messages with a channel; a message to a function is a call."""

import re
from typing import Protocol

from quire.server.tools.format_types import Channels
from quire.server.tools.output import Output
from quire.server.tools.scanner import MAX_HEADER_CHARS, Scan, Scanner
from quire.server.tools.sink import NotACallError

_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.:/-]+)")
_FUNCTION = re.compile(r"to=functions\.")


class State(Protocol):
    """What the reader learns while a reply is read."""

    thinking: bool


def read_channels(scan: Scanner, form: Channels, output: Output, state: State, *, calls_tools: bool) -> Scan[None]:
    """Read the whole reply. Text outside of messages is text for the user."""
    ends = (form.end, form.final_end, form.call_end)
    while mark := (yield from scan.until((form.start, form.channel, *ends), output.text)):
        output.mark()
        if mark in ends:
            scan.position += len(mark)
            continue
        start, parts = scan.pin(), list[str]()
        stop = yield from scan.until((form.message, *ends), parts.append, MAX_HEADER_CHARS)
        scan.unpin()
        if stop != form.message:
            scan.back_to(start)
            scan.position += len(mark)
            output.text(mark)
            continue
        scan.position += len(stop)
        yield from _message(scan, form, output, state, "".join(parts), calls_tools=calls_tools)


def _message(
    scan: Scanner, form: Channels, output: Output, state: State, header: str, *, calls_tools: bool
) -> Scan[None]:
    """The content of one message, up to the mark behind it."""
    channel = re.match(r"\s*(\w+)", header.rpartition(form.channel)[2])
    is_analysis = channel is not None and channel[1] == "analysis"
    stops = (form.start, form.channel, form.end, form.final_end, form.call_end)
    if calls_tools and _FUNCTION.search(header):
        recipient = _RECIPIENT.search(header)
        try:
            output.begin(recipient[1] if recipient else "")
        except NotACallError:
            yield from scan.until(stops, output.text)
            return
        yield from scan.space()
        yield from scan.until(stops, output.arguments)
        output.end()
        return
    state.thinking = is_analysis
    output.paragraph()
    yield from scan.until(stops, output.reasoning if is_analysis else output.text)
    state.thinking = False
    output.mark()
