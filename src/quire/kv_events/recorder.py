"""EventRecorder: listens to the block pool and the tiers, and makes events of what a step changed.

Only the first KV group is published: a prefix hit needs its blocks whatever the others hold, and routers count each
token once. Blocks stored one after the other become one event.
"""

from collections.abc import Callable, Sequence

from quire.kv_cache.block_hash import BlockHash, TokenKey, root_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.tiers import DISK, HOST, TierIndex
from quire.kv_events import vllm_hash
from quire.kv_events.messages import CPU, GPU, STORAGE, BlockRemoved, BlockStored, Event, low_bits

_MEDIA = {HOST: CPU, DISK: STORAGE}


class EventRecorder:
    """Collects events until `take`."""

    def __init__(self, pool: BlockPool, tiers: TierIndex | None, hash_name: str) -> None:
        self._pool = pool
        self._names: dict[BlockHash, int] = {}
        """Block hash → the hash that is published, for blocks that some medium holds."""
        self._num_media: dict[BlockHash, int] = {}
        """Media that hold a block."""
        self._vllm: dict[BlockHash, bytes] | None = None
        """Block hash → vLLM's, if that is published."""
        if hash_name == "sha256_cbor":
            self._vllm = {root_hash("", pool.block_size): vllm_hash.none_hash()}
        self._events: list[Event] = []
        self._last: BlockHash = b""
        """The block that the last event ended with, if it stored one in the pool."""
        pool.stored_listeners.append(self._stored)
        pool.eviction_listeners.append(self._removed)
        pool.removed_listeners.append(self._removed)
        for tier_name, tier in tiers.tiers.items() if tiers is not None else ():
            tier.listeners.append(self._tier_listener(_MEDIA[tier_name]))

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self._events, self._last = self._events, [], b""
        return events

    def _stored(
        self, block: int, block_hash: BlockHash, parent: BlockHash, token_ids: Sequence[TokenKey] | None
    ) -> None:
        if self._pool.group_of[block] != 0 or token_ids is None:
            return
        tokens = [key if isinstance(key, int) else key[0] for key in token_ids]
        name = self._name(block_hash, parent, tokens, is_plain=all(isinstance(key, int) for key in token_ids))
        known_parent = self._names.get(parent)
        self._hold(block_hash, name)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockStored) and self._last and self._last == parent:
            last.block_hashes.append(name)
            last.token_ids += tokens
        else:
            self._events.append(BlockStored([name], known_parent, tokens, self._pool.block_size))
        self._last = block_hash

    def _removed(self, block: int, block_hash: BlockHash) -> None:
        if self._pool.group_of[block] == 0:
            self._remove(block_hash, GPU)

    def _tier_listener(self, medium: str) -> Callable[[BlockHash, bool], None]:
        def listen(block_hash: BlockHash, stored: bool) -> None:
            if not stored:
                self._remove(block_hash, medium)
            elif (name := self._names.get(block_hash)) is not None:  # else another group's, or another model's
                self._hold(block_hash, name)
                self._events.append(BlockStored([name], None, [], self._pool.block_size, medium=medium))
                self._last = b""

        return listen

    def _hold(self, block_hash: BlockHash, name: int) -> None:
        self._names[block_hash] = name
        self._num_media[block_hash] = self._num_media.get(block_hash, 0) + 1

    def _remove(self, block_hash: BlockHash, medium: str) -> None:
        name = self._names.get(block_hash)
        if name is None:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and last.medium == medium:
            last.block_hashes.append(name)
        else:
            self._events.append(BlockRemoved([name], medium))
        self._last = b""
        self._num_media[block_hash] -= 1
        if not self._num_media[block_hash]:
            del self._num_media[block_hash], self._names[block_hash]
            if self._vllm is not None:
                self._vllm.pop(block_hash, None)

    def _name(self, block_hash: BlockHash, parent: BlockHash, tokens: list[int], *, is_plain: bool) -> int:
        """The hash to publish. vLLM's is known for blocks of tokens alone whose parents are all known; salts, adapters
        and images go into it in forms that other engines cannot have, so those keep their own."""
        if self._vllm is not None and is_plain and (known := self._vllm.get(parent)) is not None:
            own = self._vllm[block_hash] = vllm_hash.hash_block(known, tokens)
            return low_bits(own)
        return low_bits(block_hash)
