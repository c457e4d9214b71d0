"""Which tokens would complete a bad word."""

from hypothesis import given
from hypothesis import strategies as st

from quire.sampling.bad_words import BadWords


def completions(words: list[list[int]], output: list[int]) -> list[int]:
    bad_words = BadWords(words, vocab_size=10)
    for token_id in output:
        bad_words.append(token_id)
    return sorted(bad_words.completions())


def test_a_single_token_is_always_banned() -> None:
    assert completions([[3]], []) == [3]
    assert completions([[3]], [1, 2]) == [3]


def test_the_last_token_is_banned_only_behind_its_whole_prefix() -> None:
    word = [[1, 2, 3]]
    assert completions(word, []) == []
    assert completions(word, [2]) == []
    assert completions(word, [2, 1]) == []
    assert completions(word, [1, 2]) == [3]
    assert completions(word, [9, 1, 2]) == [3]
    assert completions(word, [1, 2, 9]) == []


def test_words_that_share_an_end_are_distinguished() -> None:
    assert completions([[1, 5, 6], [2, 5, 7], [5, 8]], [2, 5]) == [7, 8]


def test_a_repeated_token_matches_itself() -> None:
    assert completions([[4, 4]], [4]) == [4]
    assert completions([[4, 4, 4]], [4]) == []
    assert completions([[4, 4, 4]], [4, 4, 4]) == [4]


def test_a_word_that_ends_outside_the_vocabulary_bans_nothing() -> None:
    assert completions([[10], [1, 11]], [1]) == []


@given(
    words=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=6),
    output=st.lists(st.integers(0, 2), max_size=8),
)
def test_equals_the_plain_definition(words: list[list[int]], output: list[int]) -> None:
    expected = sorted(
        w[-1] for w in words if len(w) <= len(output) + 1 and output[len(output) - len(w) + 1 :] == w[:-1]
    )
    assert completions(words, output) == expected
