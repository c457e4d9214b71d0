"""RenamedBlocks: blocks of another engine under the hashes that Quire gives to the same tokens.

An engine hashes in its own way, and some hash differently in each process. Its events hold the tokens, so the router
needs to know no such way: it makes its own hashes of the tokens, and asks the engine for the tokens of a prompt.
"""

from collections import OrderedDict

from quire.kv_cache.block_hash import BlockHash, hash_block, root_hash
from quire.kv_events.messages import BlockRemoved, BlockStored, low_bits
from quire.routing.prefix_index import BlockKey


class RenamedBlocks:
    """The blocks of one server; at most `max_blocks`, the oldest go first."""

    def __init__(self, max_blocks: int) -> None:
        self.block_size = 0
        """Tokens per block; 0 before the first event."""
        self._max_blocks = max_blocks
        self._own: OrderedDict[int, BlockHash] = OrderedDict()
        """The server's hash → Quire's."""

    def stored(self, event: BlockStored) -> list[BlockKey]:
        """The blocks of an event. Those with a salt, an adapter or images are left out: the router cannot tell which
        prompts have them."""
        size, hashes = event.block_size, [low_bits(each) for each in event.block_hashes]
        if len(event.token_ids) != size * len(hashes) or not size:  # such as blocks that have moved to host memory
            return self._known(hashes)
        is_plain = event.lora_name is None and event.lora_id is None and not any(event.extra_keys or ())
        parent = root_hash("", size) if event.parent_block_hash is None else self._of_parent(event)
        if parent is None or not is_plain:
            return []
        self.block_size = size
        for number, name in enumerate(hashes):
            parent = self._own[name] = hash_block(parent, event.token_ids[number * size : (number + 1) * size])
            self._own.move_to_end(name)
        while len(self._own) > self._max_blocks:
            self._own.popitem(last=False)
        return self._known(hashes)

    def removed(self, event: BlockRemoved) -> list[BlockKey]:
        """The blocks of an event. Their names are kept: another medium may hold them."""
        return self._known([low_bits(each) for each in event.block_hashes])

    def _known(self, hashes: list[int]) -> list[BlockKey]:
        return [low_bits(own) for name in hashes if (own := self._own.get(name)) is not None]

    def _of_parent(self, event: BlockStored) -> BlockHash | None:
        return None if event.parent_block_hash is None else self._own.get(low_bits(event.parent_block_hash))
