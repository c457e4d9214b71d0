"""EventFrame: a filled frame is the event that would have been encoded."""

import pytest

from quire.server.answers import sse
from quire.server.event_frame import GAP, EventFrame


@pytest.mark.parametrize("text", ["", "a", ' "quoted" \\ ', "line\nline\r", "\0", "é😀\u2028", GAP, '{"a": [1]}'])
def test_a_filled_frame_is_the_event(text: str) -> None:
    frame = EventFrame(sse({"number": GAP, "delta": {"text": GAP}, "more": [None, "x"]}, "kind"))
    for number in (0, 12345):
        assert frame.fill(number, text) == sse({"number": number, "delta": {"text": text}, "more": [None, "x"]}, "kind")
    assert EventFrame(sse({"text": GAP, "n": 1})).fill_one(text) == sse({"text": text, "n": 1})


def test_each_gap_gets_a_value() -> None:
    with pytest.raises(ValueError, match="zip"):
        EventFrame(sse({"text": GAP})).fill("one", "two")
