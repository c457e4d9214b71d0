import pytest

from quire.kv_cache.block_hash import hash_block, root_hash


def test_names_are_32_bytes_and_depend_on_nothing_but_their_fields() -> None:
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
        (hash_block(root_hash("", 4), [7]), hash_block(hash_block(root_hash("", 4), [7]), [7])),
    ],
)
def test_what_differs_is_named_differently(one: bytes, other: bytes) -> None:
    assert one != other


def test_any_text_can_be_a_salt() -> None:
    assert root_hash("\ud800", 16) != root_hash("\ud801", 16) != root_hash("é", 16)


def test_the_largest_token_id_fits() -> None:
    root = root_hash("", 1)
    assert hash_block(root, [2**32 - 1]) != hash_block(root, [2**32 - 2])
