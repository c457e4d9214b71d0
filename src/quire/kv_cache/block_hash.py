"""Block hashes: a chained hash of everything that the keys and values in a full block depend on.

The KV of a token depends on that token and on all tokens before it, so a block's hash covers its own tokens and its
parent's hash. The chain starts from a root hash that covers what else decides the values: the cache salt, which keeps
tenants apart, and the adapter. Tokens that stand for an input such as an image also bring the hash of that input and
where the block lies in it.

Fields that vary in length are preceded by their length, and optional ones by their type. So no two different inputs
have the same encoding (CVE-2025-25183 was a weak hash here).
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from quire.request import InputSpan

BlockHash = bytes
"""32 bytes of BLAKE2b. Equal hashes mean equal tokens, history, salt, adapter and inputs."""

_STATE_GROUP = 255
"""No model has so many KV groups."""

TokenKey = int | tuple[int, bytes, int]
"""A token as prefixes compare it: its id, and inside an input also the input's hash and the token's index in it."""


class BlockExtra(NamedTuple):
    """An input that covers tokens of a block. Positions count from the first token of the block."""

    content_hash: bytes
    offset: int
    """Where the input starts; negative if it started in an earlier block."""
    end: int
    """The first position in the block that the input does not cover; the block size if it covers the last one."""


def root_hash(salt: str, block_size: int, adapter: str = "") -> BlockHash:
    """The parent of a sequence's first block."""
    # Clients write the salt: a lone surrogate in it must not be an error here.
    text = salt.encode("utf-8", "surrogatepass")
    encoded = b"root\x00%d\x00%d\x00" % (block_size, len(text)) + text
    if adapter:
        name = adapter.encode("utf-8", "surrogatepass")
        encoded += b"adapter\x00%d\x00" % len(name) + name
    return blake2b(encoded, digest_size=32).digest()


def hash_block(parent: BlockHash, token_ids: Sequence[int], extras: Sequence[BlockExtra] = ()) -> BlockHash:
    """The hash of a full block that holds `token_ids` and follows the block with the hash `parent`."""
    encoded = b"block\x00%b%d\x00%b" % (parent, len(token_ids), array("I", token_ids).tobytes())
    if extras:
        for content_hash, offset, end in extras:
            encoded += b"input\x00%d\x00%d\x00%d\x00%b" % (offset, end, len(content_hash), content_hash)
    return blake2b(encoded, digest_size=32).digest()


def group_hash(block_hash: BlockHash, group: int) -> BlockHash:
    """The hash of a KV group's block, for the hash of its tokens. The chain of hashes is the same for all groups.

    The group's number goes into the last byte. So group 0 keeps the hash itself, and a hash still has 32 bytes.
    """
    return block_hash[:-1] + bytes((block_hash[-1] ^ group,)) if group else block_hash


def state_hash(name: BlockHash) -> BlockHash:
    """The hash under which tiers store a recurrent state, for the hash of the block that it follows; and back."""
    return group_hash(name, _STATE_GROUP)


def find_extras(inputs: Sequence[InputSpan], start: int, block_size: int) -> list[BlockExtra]:
    """The inputs that cover tokens of the block that starts at token `start`, in the order of the prompt."""
    extras: list[BlockExtra] = []
    for index in range(bisect_right(inputs, start, key=_end), len(inputs)):
        content_hash, offset, length = inputs[index]
        offset -= start
        if offset >= block_size:
            break
        extras.append(BlockExtra(content_hash, offset, min(offset + length, block_size)))
    return extras


def token_keys(token_ids: Sequence[int], extras: Sequence[BlockExtra]) -> Sequence[TokenKey]:
    """The first tokens of a block as prefixes compare them: equal keys, and equal history, mean equal KV."""
    if not extras:
        return token_ids
    keys: list[TokenKey] = list(token_ids)
    for content_hash, offset, end in extras:
        for position in range(max(offset, 0), min(end, len(keys))):
            keys[position] = token_ids[position], content_hash, position - offset
    return keys


def _end(span: InputSpan) -> int:
    return span.offset + span.length
