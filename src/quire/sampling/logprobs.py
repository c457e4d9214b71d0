"""Log-probabilities as clients see them: of the model's own distribution, or of the one that tokens are sampled from.

Raw log-probabilities (the default) are computed from the model's logits before any parameter changes them. Processed
ones are computed after processors, edits, temperature and filters; a token that was filtered out has −inf.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quire.sampling.ranking import top_tokens
from quire.sampling_params import SamplingParams
from quire.step import TokenLogprobs

BLOCK_SIZE = 256
"""Tokens whose weights are summed in float32: a longer sum would lose the tail of a large vocabulary."""


def token_logprobs(logits: Tensor, token_ids: Sequence[int], k: int) -> list[TokenLogprobs]:
    """For each row of `logits` [rows, vocabulary]: its token, then its k most likely tokens (−1: the whole vocabulary).

    Takes `step.logprob_bytes` per row, the logits included. Callers keep the number of rows within their budget.
    """
    num_rows, vocab_size = logits.shape
    k = vocab_size if k < 0 else min(k, vocab_size)
    if not num_rows:
        return []
    max_logit = logits.amax(dim=-1, keepdim=True)
    total = _block_sums((logits - max_logit).exp_().numpy()).sum(axis=1)
    normaliser = max_logit.numpy().astype(np.float64) + np.log(total)[:, None]
    top, top_ids = np.empty((num_rows, 0), np.float32), np.empty((num_rows, 0), np.int64)
    if k:
        top, top_ids = top_tokens(logits, k)
    own = np.take_along_axis(logits.numpy(), np.array(token_ids)[:, None], axis=1)
    # A row with NaN or infinity needs no warning: its sequence fails for that reason.
    with np.errstate(invalid="ignore"):
        logprobs = np.concatenate([own, top], axis=1) - normaliser
    ranks = [_rank(row, token_id) for row, token_id in zip(logits.numpy(), token_ids, strict=True)]
    return [
        TokenLogprobs([token_id, *ids], values, [rank, *range(1, k + 1)])
        for token_id, rank, ids, values in zip(token_ids, ranks, top_ids.tolist(), logprobs.tolist(), strict=True)
    ]


def processed_logprobs(logits: Tensor, token_id: int, params: SamplingParams) -> TokenLogprobs:
    """Log-probabilities of one sampled token and of the `params.logprobs` most likely ones; `logits` [vocabulary] are
    those after edits.

    The tokens that min_p, top_k and top_p keep come first in the order of `ranking`, so their number is enough. Greedy
    sampling has no temperature and ignores filters. Filtered tokens are ordered by id.
    """
    values, vocab_size = logits.numpy(), len(logits)
    k = vocab_size if params.logprobs is None or params.logprobs < 0 else min(params.logprobs, vocab_size)
    temperature = 1.0 if params.greedy else params.temperature
    scores = (values.astype(np.float64) - values.max()) / temperature
    weights = np.exp(scores)
    own_rank = _rank(values, token_id)
    # Rounding at the edge of a filter may have let one token more be sampled. That token counts as kept.
    num_kept = max(_num_kept(logits, weights, params), own_rank)
    mass = weights.sum() if num_kept >= vocab_size else weights[top_tokens(logits[None], num_kept)[1][0]].sum()
    top_ids = top_tokens(logits[None], k)[1][0] if k else np.empty(0, np.int64)
    num_real = int(np.count_nonzero(values[top_ids] > -np.inf))
    if num_real < k:
        top_ids = np.append(top_ids[:num_real], np.flatnonzero(values == -np.inf)[: k - num_real])
    logprobs = scores[top_ids] - np.log(mass)
    logprobs[num_kept:] = -np.inf
    return TokenLogprobs(
        [token_id, *top_ids.tolist()],
        [float(scores[token_id] - np.log(mass)), *logprobs.tolist()],
        [own_rank, *range(1, k + 1)],
    )


def _num_kept(logits: Tensor, weights: NDArray[np.float64], params: SamplingParams) -> int:
    """How many of the most likely tokens the filters keep. `weights` are relative to the highest."""
    kept = len(weights)
    if params.greedy:
        return kept
    if params.min_p > 0.0:
        kept = int(np.count_nonzero(weights >= params.min_p))
    if 0 < params.top_k < kept:
        kept = params.top_k
    if params.top_p < 1.0:
        everything = kept == len(weights)
        needed = params.top_p * weights.sum()
        # Most nuclei are small: a long head is sorted only if a short one does not hold enough probability.
        for length in (256, 4096, kept) if everything else (kept,):
            head = weights[top_tokens(logits[None], min(length, kept))[1][0]].cumsum()
            if not everything:
                needed = params.top_p * head[-1]
            if head[-1] >= needed:
                break
        kept = min(kept, int(np.searchsorted(head, needed)) + 1)
    return kept


def _rank(row: NDArray[np.float32], token_id: int) -> int:
    """1-based place in the order of `ranking`."""
    value = row[token_id]
    return 1 + int(np.count_nonzero(row > value)) + int(np.count_nonzero(row[:token_id] == value))


def _block_sums(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Float64 sums [rows, blocks] of consecutive blocks of each row."""
    starts = np.arange(0, weights.shape[1], BLOCK_SIZE)
    return np.add.reduceat(weights, starts, axis=1).astype(np.float64)
