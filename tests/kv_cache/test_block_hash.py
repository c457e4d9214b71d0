import pytest

from quire.kv_cache.block_hash import block_name, root_name


def test_names_are_32_bytes_and_depend_on_nothing_but_their_fields() -> None:
    root = root_name("tenant", 16)
    assert len(root) == len(block_name(root, [1, 2, 3])) == 32
    assert block_name(root, [1, 2, 3]) == block_name(root_name("tenant", 16), (1, 2, 3))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (root_name("a", 16), root_name("b", 16)),
        (root_name("", 16), root_name("\x00", 16)),
        (root_name("", 16), root_name("", 1)),
        (root_name("1\x001", 1), root_name("1", 11)),
        (root_name("", 4), block_name(root_name("", 4), [])),
        (block_name(root_name("", 4), [1, 2]), block_name(root_name("", 4), [2, 1])),
        (block_name(root_name("", 4), [1]), block_name(root_name("", 4), [1, 0])),
        (block_name(root_name("", 4), [256]), block_name(root_name("", 4), [1, 0])),
        (block_name(root_name("", 4), [7]), block_name(block_name(root_name("", 4), [7]), [7])),
    ],
)
def test_what_differs_is_named_differently(one: bytes, other: bytes) -> None:
    assert one != other


def test_any_text_can_be_a_salt() -> None:
    assert root_name("\ud800", 16) != root_name("\ud801", 16) != root_name("é", 16)


def test_the_largest_token_id_fits() -> None:
    root = root_name("", 1)
    assert block_name(root, [2**32 - 1]) != block_name(root, [2**32 - 2])
