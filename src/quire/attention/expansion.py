"""Latent attention: for which sequences keys and values of heads are computed from the latent rows.

Attention over rows multiplies some four times as many numbers for a pair of a query and a key, but needs no keys and
values. With many new tokens of a sequence, making them once for all of these costs less (decision 0038).
"""

import numpy as np

from quire.attention.inputs import AttentionShape, Int64Array, StepArrays
from quire.backends import EXPANSION_WORKSPACE
from quire.dtypes import FLOAT32_BYTES

MIN_NEW_TOKENS = 192
"""With fewer new tokens in a sequence it is slower than multiplying the rows directly (DeepSeek's widths)."""


def workspace_bytes(row_dim: int, expanded_dims: tuple[int, int]) -> int:
    """Bytes for each token of a sequence: its row and one head's key and value, each as float32 and once more where it
    is copied."""
    return 2 * FLOAT32_BYTES * (row_dim + sum(expanded_dims))


def sequences_to_expand(step: StepArrays, shape: AttentionShape) -> Int64Array:
    """The sequences of a step for which it is faster and whose keys fit the workspace. A batch-invariant plan
    has none: how a token is computed must not depend on the chunk it comes in."""
    if not any(shape.expanded_dims) or shape.batch_invariant:
        return np.empty(0, dtype=np.int64)
    most_tokens = EXPANSION_WORKSPACE // workspace_bytes(shape.head_dim, shape.expanded_dims)
    return np.flatnonzero((np.diff(step.query_start_loc) >= MIN_NEW_TOKENS) & (step.seq_lens <= most_tokens))
