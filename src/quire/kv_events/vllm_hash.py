"""vLLM's block hash sha256_cbor: SHA-256 of the canonical CBOR of [parent hash, token ids, extra keys].

CBOR (RFC 8949) is written here as far as this needs it: bytes, texts, unsigned integers, arrays and null.
"""

import hashlib
from collections.abc import Sequence

_UNSIGNED, _BYTES, _TEXT, _ARRAY, _NULL = 0x00, 0x40, 0x60, 0x80, b"\xf6"

ExtraKeys = Sequence[str] | None
"""Texts that a block's content also depends on, such as a cache salt."""


def none_hash(seed: str = "vllm-none-hash") -> bytes:
    """The parent of a first block. The seed is PYTHONHASHSEED where that is set."""
    return hashlib.sha256(_text(seed)).digest()


def hash_block(parent: bytes, token_ids: Sequence[int], extra_keys: ExtraKeys = None) -> bytes:
    """The 32 bytes of a block that follows the block with the hash `parent`."""
    tokens = _head(_ARRAY, len(token_ids)) + b"".join([_head(_UNSIGNED, token_id) for token_id in token_ids])
    extra = _NULL if extra_keys is None else _head(_ARRAY, len(extra_keys)) + b"".join(map(_text, extra_keys))
    return hashlib.sha256(_head(_ARRAY, 3) + _head(_BYTES, len(parent)) + parent + tokens + extra).digest()


def _text(value: str) -> bytes:
    data = value.encode()
    return _head(_TEXT, len(data)) + data


def _head(kind: int, number: int) -> bytes:
    """The type of an item, with its value or length in as few bytes as possible."""
    if number < 24:
        return bytes((kind | number,))
    for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << (8 * size):
            return bytes((kind | code,)) + number.to_bytes(size, "big")
    raise ValueError(f"{number} has more than 64 bits")
