"""Top-k tokens of a row, in Quire's only order: highest score first, lowest id first among equals."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_SIZE = 32
"""Neighbouring tokens, represented by their maximum while the blocks of the top k are searched."""


def top_tokens(scores: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores and ids, both [rows, min(k, vocabulary)], of the k highest of each row of `scores` [rows, vocabulary].

    The result does not depend on k beyond its length, nor on the other rows. The order among −inf is not defined.
    """
    if k >= scores.shape[1]:
        ordered = scores.sort(dim=-1, descending=True, stable=True)
        return ordered.values.numpy(), ordered.indices.numpy()
    # One more than asked shows whether the last token is tied with one that was left out.
    values, ids = (part.numpy() for part in _top(scores, k + 1))
    tied = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -np.inf)).any(axis=1)
    for row in np.flatnonzero(tied):
        row_scores = scores[row].numpy()
        candidates = np.flatnonzero(row_scores >= values[row, k - 1])
        order = np.argsort(-row_scores[candidates], kind="stable")[:k]
        ids[row, :k] = candidates[order]
        values[row, :k] = row_scores[candidates[order]]
    return values[:, :k], ids[:, :k]


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` within the k blocks of highest maximum: every value above the k-th lies in one of them.

    As with `torch.topk`, it is arbitrary which of the tokens equal to the k-th are included.
    """
    num_rows, vocab_size = scores.shape
    num_blocks = vocab_size // BLOCK_SIZE
    if 4 * k > num_blocks:  # the blocks would hold so much of the row that finding them does not pay
        values, ids = scores.topk(k)
        return values, ids
    whole = num_blocks * BLOCK_SIZE
    maxima = scores[:, :whole].unflatten(1, (num_blocks, BLOCK_SIZE)).amax(-1)
    blocks = maxima.topk(k, sorted=False).indices
    inside = (blocks.unsqueeze(-1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten(1)
    remainder = torch.arange(whole, vocab_size).expand(num_rows, -1)
    candidates = torch.cat([inside, remainder], dim=1)
    values, places = scores.gather(1, candidates).topk(k)
    return values, candidates.gather(1, places)
