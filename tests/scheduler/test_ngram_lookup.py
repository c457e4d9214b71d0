"""Lookups against the definition: the latest earlier place of the longest run that ends the tokens."""

from hypothesis import given
from hypothesis import strategies as st

from quire.scheduler.ngram_lookup import Match, NgramLookup, follow


def every_match(token_ids: list[int], longest: int) -> list[Match]:
    """By trying every place, of the latest first; a run that is longer than `longest` counts as so long."""
    end, matches = len(token_ids), []
    for start in range(end - 1, 0, -1):
        length = 0
        while length < min(longest, start) and token_ids[start - 1 - length] == token_ids[end - 1 - length]:
            length += 1
        matches.append(Match(start, length))
    return matches


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_the_latest_place_of_the_longest_run(pieces: list[list[int]], shortest: int, more: int) -> None:
    """But where the run found last goes on and is as long as any is looked for: then it is gone on with."""
    lookup, token_ids, last = NgramLookup(shortest, shortest + more), list[int](), None
    for piece in pieces:
        token_ids += piece
        found = lookup.find(token_ids)
        matches = every_match(token_ids, shortest + more)
        best = max(matches, key=lambda match: match.length, default=None)
        if best is None or best.length < shortest:
            assert found is None
        elif found != best:
            assert found is not None
            assert last is not None
            assert found in matches
            assert found.length == best.length == shortest + more
            assert found.start == last.start + len(piece)
        last = found


def test_a_loop_is_followed_round() -> None:
    assert NgramLookup(2, 4).find([9, 1, 2, 3, 1, 2, 3]) == Match(4, 3)
    assert follow([9, 1, 2, 3, 1, 2, 3], 4, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert follow([9, 1, 2, 3, 1, 2, 3], 4, 2) == [1, 2]
    assert follow([5, 5], 1, 3) == [5, 5, 5]


def test_nothing_is_found_without_a_match() -> None:
    lookup = NgramLookup(2, 4)
    assert lookup.find([]) is None
    assert lookup.find([1]) is None
    assert lookup.find([1, 2]) is None
    assert lookup.find([1, 2, 3, 2]) is None
    assert lookup.find([1, 2, 3, 2, 3]) == Match(3, 2)
