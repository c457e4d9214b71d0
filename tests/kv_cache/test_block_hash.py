"""Block hashes: equal if and only if everything that the block's KV depends on is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import RequestError
from quire.kv_cache.block_hash import BlockExtra, find_extras, hash_block, root_hash, token_keys
from quire.request import InputSpan, Request
from quire.sampling_params import SamplingParams


def test_hashes_are_32_bytes_and_depend_on_nothing_but_their_fields() -> None:
    root = root_hash("tenant", 16)
    assert len(root) == len(hash_block(root, [1, 2, 3])) == 32
    assert hash_block(root, [1, 2, 3]) == hash_block(root_hash("tenant", 16), (1, 2, 3))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (root_hash("a", 16), root_hash("b", 16)),
        (root_hash("", 16), root_hash("\x00", 16)),
        (root_hash("", 16), root_hash("", 1)),
        (root_hash("1\x001", 1), root_hash("1", 11)),
        (root_hash("", 4), hash_block(root_hash("", 4), [])),
        (hash_block(root_hash("", 4), [1, 2]), hash_block(root_hash("", 4), [2, 1])),
        (hash_block(root_hash("", 4), [1]), hash_block(root_hash("", 4), [1, 0])),
        (hash_block(root_hash("", 4), [256]), hash_block(root_hash("", 4), [1, 0])),
        (root_hash("", 4), root_hash("", 4, "a")),
        (root_hash("a", 4), root_hash("", 4, "a")),
        (root_hash("", 4, "a"), root_hash("adapter\x001\x00a", 4)),
        (hash_block(root_hash("", 4), [7]), hash_block(hash_block(root_hash("", 4), [7]), [7])),
    ],
)
def test_what_differs_has_another_hash(one: bytes, other: bytes) -> None:
    assert one != other


def test_any_text_can_be_a_salt() -> None:
    assert root_hash("\ud800", 16) != root_hash("\ud801", 16) != root_hash("é", 16)


def test_the_largest_token_id_fits() -> None:
    root = root_hash("", 1)
    assert hash_block(root, [2**32 - 1]) != hash_block(root, [2**32 - 2])


# -- adapters, and inputs that are not text --------------------------------------------------------------------------

SIZE = 4
CONTENT = st.sampled_from([b"a", b"b", b"ab", b"0\x00", bytes(32)])


def test_without_adapter_and_inputs_a_hash_is_what_it_always_was() -> None:
    """Blocks on disk outlive the process that stored them."""
    root = root_hash("tenant", 16)
    assert root.hex() == "668b419f21873aaad2536f21a379d19d1941d5c92f238d2da5bd5b228bf1fd28"
    assert hash_block(root, range(16)).hex() == "d5f17ac11ef3538c330042c097b49877a1de50e620d76cdff398a9a7b4f0f834"


@st.composite
def contexts(draw: st.DrawFn) -> tuple[str, str, list[int], list[InputSpan]]:
    """Salt, adapter, tokens of up to three blocks, and inputs in them."""
    token_ids = draw(st.lists(st.integers(0, 1), min_size=1, max_size=3)) * SIZE
    inputs, end = list[InputSpan](), 0
    while end < len(token_ids) and draw(st.booleans()):
        offset = draw(st.integers(end, len(token_ids) - 1))
        inputs.append(InputSpan(draw(CONTENT), offset, draw(st.integers(1, len(token_ids) - offset))))
        end = offset + inputs[-1].length
    return draw(st.sampled_from(["", "s"])), draw(st.sampled_from(["", "s", "t"])), token_ids, inputs


def hashes(salt: str, adapter: str, token_ids: list[int], inputs: list[InputSpan]) -> list[bytes]:
    parent, found = root_hash(salt, SIZE, adapter), []
    for start in range(0, len(token_ids), SIZE):
        parent = hash_block(parent, token_ids[start : start + SIZE], find_extras(inputs, start, SIZE))
        found.append(parent)
    return found


def plain(token_ids: list[int], inputs: list[InputSpan]) -> list[object]:
    """Every token with the input that covers it, by definition."""
    covered = {s.offset + index: (s.content_hash, index) for s in inputs for index in range(s.length)}
    return [(token, covered.get(index)) for index, token in enumerate(token_ids)]


@given(contexts(), contexts())
def test_hashes_are_equal_if_and_only_if_all_that_they_cover_is(
    one: tuple[str, str, list[int], list[InputSpan]], other: tuple[str, str, list[int], list[InputSpan]]
) -> None:
    mine, others = plain(*one[2:]), plain(*other[2:])
    for index, (a, b) in enumerate(zip(hashes(*one), hashes(*other), strict=False)):
        end = (index + 1) * SIZE
        assert (a == b) == (one[:2] == other[:2] and mine[:end] == others[:end])


@given(contexts(), contexts())
def test_keys_are_equal_where_tokens_and_inputs_are(
    one: tuple[str, str, list[int], list[InputSpan]], other: tuple[str, str, list[int], list[InputSpan]]
) -> None:
    (_, _, tokens, inputs), (_, _, other_tokens, other_inputs) = one, other
    for start in range(0, min(len(tokens), len(other_tokens)), SIZE):
        mine = token_keys(tokens[start : start + SIZE], find_extras(inputs, start, SIZE))
        others = token_keys(other_tokens[start : start + SIZE], find_extras(other_inputs, start, SIZE))
        expected = zip(plain(tokens, inputs)[start:], plain(other_tokens, other_inputs)[start:], strict=False)
        assert [a == b for a, b in zip(mine, others, strict=True)] == [a == b for a, b in expected][:SIZE]


@given(st.lists(st.tuples(CONTENT, st.integers(-9, 3), st.integers(1, 4)), max_size=3), st.data())
def test_no_two_lists_of_extras_have_one_hash(raw: list[tuple[bytes, int, int]], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.tuples(CONTENT, st.integers(-9, 3), st.integers(1, 4)), max_size=3))
    one_hash = hash_block(bytes(32), [7] * SIZE, [BlockExtra(*each) for each in raw])
    assert (one_hash == hash_block(bytes(32), [7] * SIZE, [BlockExtra(*each) for each in other])) == (raw == other)


def test_an_input_is_known_by_its_place_in_each_block_that_it_covers() -> None:
    inputs = [InputSpan(b"a", 2, 7), InputSpan(b"b", 9, 1)]
    assert find_extras(inputs, 0, 4) == [(b"a", 2, 4)]
    assert find_extras(inputs, 4, 4) == [(b"a", -2, 4)]
    assert find_extras(inputs, 8, 4) == [(b"a", -6, 1), (b"b", 1, 2)]
    assert find_extras(inputs, 12, 4) == []


@pytest.mark.parametrize(
    "inputs",
    [
        [InputSpan(b"a", 0, 4), InputSpan(b"b", 3, 1)],
        [InputSpan(b"a", 4, 1), InputSpan(b"b", 0, 1)],
        [InputSpan(b"a", 7, 2)],
        [InputSpan(b"a", -1, 2)],
        [InputSpan(b"a", 0, 0)],
        [InputSpan(b"", 0, 1)],
    ],
)
def test_inputs_that_do_not_lie_in_the_prompt_one_after_the_other_are_refused(inputs: list[InputSpan]) -> None:
    with pytest.raises(RequestError, match=r"an input of -?\d+ tokens .* starts at token"):
        Request(request_id="r", prompt_token_ids=[1] * 8, params=SamplingParams(), inputs=tuple(inputs))
