"""Rows of logits that are worked on together: few enough for their temporaries, and not copied if they lie together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_ELEMENTS = 2**21
"""Logits worked on together (64 rows of 32,768). More are no faster, and their temporaries do not fit the cache."""

RowIndex = slice | NDArray[np.int64]
"""Rows as an index: a slice for neighbouring rows, which makes a view; an array for others, which makes a copy."""


def split_rows(rows: Sequence[int], vocab_size: int) -> list[Sequence[int]]:
    """`rows` in pieces of at most `MAX_ELEMENTS` logits."""
    max_rows = max(1, MAX_ELEMENTS // vocab_size)
    return [rows[start : start + max_rows] for start in range(0, len(rows), max_rows)]


def row_index(rows: Sequence[int]) -> RowIndex:
    """The index of one or more ascending rows."""
    first, end = rows[0], rows[-1] + 1
    return slice(first, end) if end - first == len(rows) else np.array(rows, dtype=np.int64)
