"""Log-probabilities as clients see them: of the model's own distribution, before any parameter changed it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quire.sampling.draws import block_sums
from quire.sampling.ranking import leading_tokens
from quire.step import TokenLogprobs

MAX_CHUNK_ELEMENTS = 2**21
"""Logits looked at together, so that the temporaries of a long prompt stay small."""


def token_logprobs(logits: Tensor, token_ids: Sequence[int], k: int) -> list[TokenLogprobs]:
    """For each row of `logits` [rows, vocabulary]: its token, then its k most likely ones (−1: all there are)."""
    vocab_size = logits.shape[1]
    k = vocab_size if k < 0 else min(k, vocab_size)
    chunk = max(1, MAX_CHUNK_ELEMENTS // vocab_size)
    reports: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), chunk):
        reports += _report(logits[start : start + chunk], token_ids[start : start + chunk], k)
    return reports


def prompt_logprobs(logits: Tensor, target_ids: Sequence[int], k: int) -> list[TokenLogprobs]:
    """The same for positions of a prompt: row i of `logits` predicts `target_ids[i]`."""
    return token_logprobs(logits, target_ids, k)


def _report(logits: Tensor, token_ids: Sequence[int], k: int) -> list[TokenLogprobs]:
    num_rows = len(token_ids)
    peak = logits.amax(dim=-1, keepdim=True)
    total = block_sums((logits - peak).exp_().numpy()).sum(axis=1)
    normaliser = peak.numpy().astype(np.float64) + np.log(total)[:, None]
    leading, leading_ids = np.empty((num_rows, 0), np.float32), np.empty((num_rows, 0), np.int64)
    if k:
        leading, leading_ids = leading_tokens(logits, k)
    own = np.take_along_axis(logits.numpy(), np.array(token_ids)[:, None], axis=1)
    # A row with NaN or infinity makes no sense and need not warn: its sequence fails for that reason.
    with np.errstate(invalid="ignore"):
        logprobs = np.concatenate([own, leading], axis=1) - normaliser
    ranks = [_rank(row, token_id) for row, token_id in zip(logits.numpy(), token_ids, strict=True)]
    return [
        TokenLogprobs([token_id, *ids], values, [rank, *range(1, k + 1)])
        for token_id, rank, ids, values in zip(token_ids, ranks, leading_ids.tolist(), logprobs.tolist(), strict=True)
    ]


def _rank(row: NDArray[np.float32], token_id: int) -> int:
    """1-based place in the order of `ranking`."""
    value = row[token_id]
    return 1 + int(np.count_nonzero(row > value)) + int(np.count_nonzero(row[:token_id] == value))
