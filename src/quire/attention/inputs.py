"""AttentionShape and StepArrays: what a planner takes, once and in every step."""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
ALL_POSITIONS = 2**24
"""More positions than any sequence has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What is the same in every step."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Elements of a query and of a key."""
    block_size: int
    value_dim: int = 0
    """Elements of a value; 0: as many as a key has."""
    expanded_dims: tuple[int, int] = (0, 0)
    """Elements of a head's key and value together, computed from a latent row; 0: the layers are not latent."""
    window: int = 0
    """Positions that a token of the group's layers sees; 0: all. A plan serves layers with this window or a smaller
    one."""
    lookahead: int = 0
    """Positions after its own that a token sees: 0 in a decoder, `ALL_POSITIONS` in an encoder, half of the window in
    its layers with a window. A sequence's tokens are then computed in one step."""
    image_tokens: int = 0
    """Most tokens of an image, where they see each other; 0: a token of an image sees those before it."""
    max_num_seqs: int = 0
    """Sequences in a step. This and the next two limits are for backends whose plans are in fixed buffers."""
    max_num_tokens: int = 0
    """New tokens in a step, of all sequences together."""
    max_blocks: int = 0
    """Blocks of one sequence."""
    num_threads: int = 1
    kv_element_size: int = 4
    """Bytes of a number in the cache."""
    batch_invariant: bool = False
    """If true, a token's result does not depend on other sequences, chunks or the number of threads, bit for bit:
    nothing is shared, and the order in which a token's keys are summed depends on its position alone."""
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


class StepArrays(NamedTuple):
    """A step on the host: B sequences with T new tokens, which are the last of each sequence. All int32."""

    query_start_loc: Int32Array
    """[B + 1]: the new tokens of sequence s are query_start_loc[s] up to query_start_loc[s + 1]."""
    seq_lens: Int32Array
    """[B]: tokens of each sequence, the new ones included."""
    block_tables: Int32Array
    """[B, most blocks of any sequence]"""
    slots: Int32Array
    """[T]: where each new token's KV is stored, block * block_size + offset."""
    lookaheads: Int32Array | None = None
    """[B]: positions after its own that the first new token of a sequence sees; where it is above 0, the others see the
    same keys (`quire.attention.image_runs`). None: no sequence has any."""

    @property
    def key_ends(self) -> Int32Array:
        """[B]: the end of the keys that the new tokens of each sequence see."""
        if self.lookaheads is None:
            return self.seq_lens
        ends = self.seq_lens - np.diff(self.query_start_loc) + self.lookaheads + np.int32(1)
        return np.where(self.lookaheads > 0, ends, self.seq_lens)
