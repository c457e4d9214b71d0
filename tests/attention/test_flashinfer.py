"""What FlashInfer plans from says again what the block tables say."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quire.attention.flashinfer import list_pages


@given(st.lists(st.integers(1, 100), min_size=1, max_size=9), st.sampled_from([1, 16, 48]), st.integers(0, 3))
def test_pages_are_the_blocks_in_use(lengths: list[int], block_size: int, beyond: int) -> None:
    seq_lens = np.array(lengths, dtype=np.int32)
    width = -(-max(lengths) // block_size) + beyond
    tables = np.random.default_rng(0).permutation(len(lengths) * width).astype(np.int32).reshape(len(lengths), width)
    pages = list_pages(seq_lens, tables, block_size)
    assert {each.dtype for each in pages} == {np.dtype(np.int32)}
    assert len(pages.indices) == pages.indptr[-1]
    for row, length in enumerate(lengths):
        found = pages.indices[pages.indptr[row] : pages.indptr[row + 1]]
        assert 1 <= pages.last_page_len[row] <= block_size
        assert (len(found) - 1) * block_size + pages.last_page_len[row] == length
        assert found.tolist() == tables[row, : len(found)].tolist()
