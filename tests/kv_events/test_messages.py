"""KV events against golden bytes of vLLM 0.32 (its own encoder, run once), in both encodings."""

import msgspec
import pytest

from quire.kv_events.messages import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventsError,
    decode_events,
    encode_events,
    low_bits,
)
from quire.kv_events.vllm_hash import hash_block, none_hash

WINDOW = BlockStored([7], None, [1], 1, extra_keys=[["salt"]], group_idx=2, kv_cache_spec_kind="sliding_window")
EVENTS = [BlockStored([7], None, [1, 2], 2), BlockRemoved([7]), AllBlocksCleared()]


def test_maps_are_as_vllm_writes_them() -> None:
    decoded = msgspec.msgpack.decode(encode_events(1.5, EVENTS))
    assert decoded == [
        1.5,
        [
            {
                "type": "BlockStored",
                "block_hashes": [7],
                "parent_block_hash": None,
                "token_ids": [1, 2],
                "block_size": 2,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
            },
            {"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU"},
            {"type": "AllBlocksCleared"},
        ],
        None,
    ]
    assert list(decoded[1][0])[:3] == ["type", "block_hashes", "parent_block_hash"]


def test_arrays_are_as_vllm_wrote_them() -> None:
    assert msgspec.msgpack.decode(encode_events(1.5, EVENTS, as_arrays=True))[1] == [
        ["BlockStored", [7], None, [1, 2], 2, None, "GPU", None],
        ["BlockRemoved", [7], "GPU"],
        ["AllBlocksCleared"],
    ]


@pytest.mark.parametrize("as_arrays", [False, True])
def test_both_forms_are_read(as_arrays: bool) -> None:
    assert decode_events(encode_events(1.5, EVENTS, as_arrays=as_arrays)) == EVENTS


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        ([["BlockStored", [b"\x01" * 32], 5, [1], 1]], [BlockStored([b"\x01" * 32], 5, [1], 1)]),
        ([["BlockRemoved", [7]]], [BlockRemoved([7])]),
        ([["BlockRemoved", [7], "CPU", 1, "later field"]], [BlockRemoved([7], "CPU", 1)]),
        ([["BlockStored", [7], None, [1], 1, None, "GPU", None, [["salt"]], 2, "sliding_window", "later"]], [WINDOW]),
        (
            [
                {
                    "type": "BlockStored",
                    "block_hashes": [7],
                    "parent_block_hash": None,
                    "token_ids": [1],
                    "block_size": 1,
                    "extra_keys": [["salt"]],
                    "group_idx": 2,
                    "kv_cache_spec_kind": "sliding_window",
                    "later": 1,
                }
            ],
            [WINDOW],
        ),
        ([{"type": "BlockRemoved", "block_hashes": [7], "group_idx": 2}], [BlockRemoved([7], group_idx=2)]),
        ([{"type": "SomethingNew", "x": 1}, ["SomethingNew"]], []),
        ([], []),
    ],
)
def test_older_and_later_versions_are_read(events: list[object], wanted: list[object]) -> None:
    assert decode_events(msgspec.msgpack.encode([1.0, events, 0])) == wanted
    assert decode_events(msgspec.msgpack.encode([1.0, events])) == wanted


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(5),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode([1.0, [{}]]),
        msgspec.msgpack.encode([1.0, [[]]]),
        msgspec.msgpack.encode([1.0, [7]]),
        msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved"}]]),
        msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": ["x"]}]]),
        msgspec.msgpack.encode([1.0, [{"type": ["BlockRemoved"]}]]),
    ],
)
def test_other_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(EventsError, match=f"a message of {len(data)} bytes"):
        decode_events(data)


def test_hashes_are_vllms() -> None:
    root = none_hash()
    assert root.hex().startswith("9bd96a48")
    assert root.hex().endswith("81eef0")
    first = hash_block(root, [1, 2, 3, 4])
    assert first.hex() == "58d0879dff3800f65f8c5fd449d73048c0f7699dd238a03b84b146b151d55111"
    assert low_bits(first) == low_bits(9561501211280363793) == 9561501211280363793


@pytest.mark.parametrize("token", [0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32])
def test_numbers_take_the_fewest_bytes(token: int) -> None:
    """RFC 8949: each length of a number is another hash."""
    import hashlib

    size = next(size for size in (0, 1, 2, 4, 8) if token < (24 if size == 0 else 1 << 8 * size))
    head = bytes([token]) if size == 0 else bytes([{1: 24, 2: 25, 4: 26, 8: 27}[size]]) + token.to_bytes(size, "big")
    assert hash_block(b"p", [token], ["s"]) == hashlib.sha256(b"\x83\x41p\x81" + head + b"\x81\x61s").digest()
