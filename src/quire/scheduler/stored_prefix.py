"""StoredPrefix: a hit that the pool and the tiers have together. Loading: what of it is on its way up to a sequence."""

from collections import Counter
from dataclasses import dataclass, field

from quire.kv_cache.block_hash import BlockHash
from quire.kv_cache.prefix_search import Source, Stored
from quire.kv_cache.tiers import DISK

DEVICE = "device"
"""The origin of tokens whose KV is in the pool."""


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """The hit after what the pool alone has."""

    first: int
    """Logical blocks that the pool alone has."""
    sources: list[list[Source | None]]
    """For each KV group, where each logical block of the hit is; None: the hit does not need it."""
    not_worth: list[str]
    """The tiers of blocks that would make the hit longer, but are computed faster than loaded."""
    state: Stored | None = None
    """The recurrent state at its end, if a tier has it and the pool has not."""

    @property
    def num_blocks(self) -> int:
        """Logical blocks of the hit."""
        return len(self.sources[0])

    def __bool__(self) -> bool:
        return self.num_blocks > self.first or self.state is not None

    @property
    def stored(self) -> list[Stored]:
        """The blocks to load, in the order of logical blocks."""
        rows = zip(*(sources[self.first :] for sources in self.sources), strict=True)
        return [source for row in rows for source in row if isinstance(source, tuple)]


@dataclass(slots=True)
class Loading:
    """A sequence's logical blocks from `first` up to `end`: some blocks of them come from the tiers."""

    first: int
    end: int
    blocks: dict[BlockHash, tuple[str, int, int]]
    """(tier, logical block, block of the pool) of each block that is loaded, in the order of logical blocks."""
    unplanned: set[BlockHash] = field(default_factory=set)
    """Blocks that no plan has loaded yet."""
    unread: list[BlockHash] = field(default_factory=list)
    """Blocks on disk that no plan has read yet, the first at the end."""

    def cut(self, end: int) -> set[BlockHash]:
        """End at an earlier logical block. Returns the blocks that are not loaded after all."""
        lost = {block_hash for block_hash, (_, index, _) in self.blocks.items() if index >= end}
        for block_hash in lost:
            del self.blocks[block_hash]
        self.end = end
        self.unplanned -= lost
        self.unread = [block_hash for block_hash in self.unread if block_hash not in lost]
        return lost

    def tokens_by_origin(self, block_size: int) -> dict[str, int]:
        """Tokens by origin. A token whose KV groups come from several places counts for the slowest one."""
        origins = dict.fromkeys(range(self.first, self.end), DEVICE)
        for tier_name, index, _ in self.blocks.values():
            if index >= self.first and (tier_name == DISK or origins[index] == DEVICE):
                origins[index] = tier_name
        return {origin: count * block_size for origin, count in Counter(origins.values()).items()}
