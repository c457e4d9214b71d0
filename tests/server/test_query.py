"""Parameters of a path: what is read, and what is refused by name."""

import pytest

from quire.errors import RequestError
from quire.server.query import read_ascending, read_whole_number


@pytest.mark.parametrize(("query", "number"), [({}, 20), ({"limit": "1"}, 1), ({"limit": "007"}, 7)])
def test_whole_numbers(query: dict[str, str], number: int) -> None:
    assert read_whole_number(query, "limit", 20, low=1, high=100) == number


@pytest.mark.parametrize("text", ["", "0", "101", "-1", "1.5", "x", "²", "9" * 5000, "0" * 13])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"limit is .* from 1 to 100") as refused:
        read_whole_number({"limit": text}, "limit", 20, low=1, high=100)
    assert refused.value.param == "limit"
    assert len(refused.value.message) < 120


def test_order() -> None:
    assert [read_ascending(query) for query in ({}, {"order": "desc"}, {"order": "asc"})] == [False, False, True]
    with pytest.raises(RequestError, match="order is 'up'; supported: asc, desc"):
        read_ascending({"order": "up"})
