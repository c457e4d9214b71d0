"""What FlashInfer plans a step from: the blocks of all sequences in one row. Nothing here imports FlashInfer."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Pages(NamedTuple):
    """Block tables as a compressed sparse row. FlashInfer says page for block."""

    indptr: NDArray[np.int32]
    """[B + 1]: the blocks of sequence s are indices[indptr[s]:indptr[s + 1]]."""
    indices: NDArray[np.int32]
    last_page_len: NDArray[np.int32]
    """[B]: tokens in the last block of each sequence, from 1 to the block size."""


def list_pages(seq_lens: NDArray[np.int32], block_tables: NDArray[np.int32], block_size: int) -> Pages:
    """The blocks that hold sequences of `seq_lens` tokens, at least one each; tables may go on beyond them."""
    counts = -(-seq_lens // block_size)
    held = np.arange(block_tables.shape[1]) < counts[:, None]
    indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return Pages(indptr, block_tables[held], (seq_lens - (counts - 1) * block_size).astype(np.int32))
