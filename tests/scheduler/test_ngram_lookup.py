"""Lookups against the definition: the latest earlier place of the longest n-gram that ends the tokens."""

from hypothesis import given
from hypothesis import strategies as st

from quire.scheduler.ngram_lookup import NgramLookup


def drafted(token_ids: list[int], shortest: int, longest: int, max_tokens: int) -> list[int]:
    """By trying every place."""
    for length in range(longest, shortest - 1, -1):
        for start in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[start - length : start] == token_ids[len(token_ids) - length :]:
                draft = token_ids[start : start + max_tokens]
                while len(draft) < max_tokens:
                    draft.append((token_ids[start:] + draft)[len(draft)])
                return draft
    return []


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=40),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 7),
)
def test_the_latest_place_of_the_longest_run(
    pieces: list[list[int]], shortest: int, more: int, max_tokens: int
) -> None:
    """Few tokens in few places: tables with room for them keep what was entered, unless two runs share a place."""
    lookup, token_ids = NgramLookup(shortest, shortest + more), list[int]()
    for piece in pieces:
        token_ids += piece
        found = lookup.draft(token_ids, max_tokens)
        expected = drafted(token_ids, shortest, shortest + more, max_tokens)
        if found != expected:
            # Two n-grams in one place: the later one hides the other, and a shorter one or an earlier place is taken.
            assert not found or found in every_draft(token_ids, shortest, shortest + more, max_tokens)


def every_draft(token_ids: list[int], shortest: int, longest: int, max_tokens: int) -> list[list[int]]:
    return [drafted(token_ids, shortest, length, max_tokens) for length in range(shortest, longest + 1)]


def test_a_loop_is_followed_round() -> None:
    assert NgramLookup(2, 4).draft([9, 1, 2, 3, 1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert NgramLookup(1, 1).draft([5, 5], 3) == [5, 5, 5]


def test_nothing_is_drafted_without_a_match() -> None:
    lookup = NgramLookup(2, 4)
    assert lookup.draft([], 3) == []
    assert lookup.draft([1], 3) == []
    assert lookup.draft([1, 2], 3) == []
    assert lookup.draft([1, 2, 3, 2], 3) == []
    assert lookup.draft([1, 2, 3, 2, 3], 3) == [2, 3, 2]


def test_most_is_found_in_a_long_text() -> None:
    """Of 2,000 different tokens that come a second time, at most a few are hidden by others in their place."""
    text = list(range(2_000))
    lookup = NgramLookup(2, 2)
    repeated = [lookup.draft(text + text[:count], 1) for count in range(2, 2_000)]
    assert sum(draft == [count] for count, draft in enumerate(repeated, start=2)) > 1_500
