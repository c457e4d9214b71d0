"""Names of full blocks: a chained hash of everything the keys and values in a block depend on.

The KV of a token depends on that token and all before it, so a block's name covers its own tokens and its
parent's name. The chain starts from a root that covers what else decides the values: the salt that separates
tenants. Every field goes in with its type and length, so that no two different inputs serialise alike
(CVE-2025-25183 was a weak hash here).
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

BlockHash = bytes
"""32 bytes of BLAKE2b; equal names mean equal tokens, equal history, equal salt."""


def root_hash(salt: str, block_size: int) -> BlockHash:
    """The parent of a sequence's first block."""
    # Clients write the salt: a lone surrogate in it must not be an error here.
    text = salt.encode("utf-8", "surrogatepass")
    return blake2b(b"root\x00%d\x00%d\x00" % (block_size, len(text)) + text, digest_size=32).digest()


def hash_block(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The name of a full block that holds `token_ids` and follows the block named `parent`."""
    tokens = array("I", token_ids).tobytes()
    return blake2b(b"block\x00" + parent + b"%d\x00" % len(token_ids) + tokens, digest_size=32).digest()
