"""Found: what a waiting group, or a sequence that resumes, can start from."""

from typing import NamedTuple

from quire.kv_cache.block_table import GroupBlocks
from quire.kv_cache.states import FoundState
from quire.scheduler.stored_prefix import StoredPrefix


class Found(NamedTuple):
    """What a waiting group can start from."""

    blocks: GroupBlocks
    """Full blocks of the pool, for each KV group."""
    stored: StoredPrefix | None = None
    """The longer hit with blocks of tiers, if there is one."""
    inside: tuple[list[int], int] | None = None
    """The next block after those, if only its beginning can be shared; see `BlockTable.match_partial`."""
    state: FoundState | None = None
    """In a model with recurrent layers, the snapshot at the end of all these."""
    num_known_tokens: int = 0
    """Tokens whose KV the pool holds, perhaps past that snapshot."""

    @property
    def num_blocks(self) -> int:
        """Logical blocks found in the pool."""
        return len(self.blocks[0])
