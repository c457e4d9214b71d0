"""From scores and uniform numbers to tokens: inverse-CDF draws over all tokens, the top k, or the nucleus of top_p.

A score is a logit over temperature, shifted so that the highest of each row is 0; −inf is a token that cannot be
drawn. Each row is computed from its own values alone, in an order that neither the other rows nor the number of
threads can change. Sums over the vocabulary are taken in float64 over short float32 blocks: a running float32 sum
stops seeing the tail of a large vocabulary.

top_k and top_p both keep the head of the order of `ranking`, so what is kept is the first entries of a sorted row;
no row is ever sorted further than its draw needs.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.sampling.ranking import leading_tokens

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
MinP = NDArray[np.float32] | None

BLOCK_SIZE = 256
"""Tokens whose weights are summed in float32."""
NUM_LEADING = 64
"""Tokens sorted at first for top_p; most nuclei of a trained model are smaller."""
BUCKETS_PER_UNIT = 64
NUM_BUCKETS = 2048
"""Of score, for larger nuclei: buckets of 1/64 down to −32, below which the last one takes all."""


def draw_unfiltered(scores: Tensor, min_p: MinP, uniform: FloatArray) -> IntArray:
    """One token per row of `scores` [rows, vocabulary], by its weight exp(score). Overwrites `scores`."""
    weights = scores.exp_().numpy()
    _drop_unlikely(weights, min_p)
    cumulative = block_sums(weights).cumsum(axis=1)
    target = _targets(uniform, cumulative[:, -1])
    block = _first_above(cumulative, target)
    rows = np.arange(len(block))
    before = np.where(block > 0, cumulative[rows, block - 1], 0.0)
    # The block of each target is walked token by token; a short last block is padded with tokens of no weight.
    ids = block[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
    inside = np.zeros(ids.shape)
    exists = ids < weights.shape[1]
    inside[exists] = np.take_along_axis(weights, np.minimum(ids, weights.shape[1] - 1), axis=1)[exists]
    cumulative = inside.cumsum(axis=1)
    target = np.minimum(target - before, np.nextafter(cumulative[:, -1], 0.0))
    return block * BLOCK_SIZE + _first_above(cumulative, target)


def draw_top_k(scores: Tensor, min_p: MinP, top_k: IntArray, top_p: FloatArray, uniform: FloatArray) -> IntArray:
    """One of the `top_k` highest tokens of each row, of which `top_p` keeps the fewest that hold its share."""
    values, ids = leading_tokens(scores, int(top_k.max()))
    weights = np.exp(values, dtype=np.float64)
    _drop_unlikely(weights, min_p)
    weights[np.arange(values.shape[1]) >= top_k[:, None]] = 0.0
    cumulative = weights.cumsum(axis=1)
    return _draw_from_head(ids, cumulative, top_p * cumulative[:, -1], uniform)


def draw_top_p(scores: Tensor, min_p: MinP, top_p: FloatArray, uniform: FloatArray) -> IntArray:
    """One of the fewest highest tokens of each row that hold `top_p` of its probability."""
    weights = scores.exp().numpy()
    _drop_unlikely(weights, min_p)
    needed = top_p * block_sums(weights).sum(axis=1)
    _, ids = leading_tokens(scores, NUM_LEADING)
    cumulative = np.take_along_axis(weights, ids, axis=1).cumsum(axis=1, dtype=np.float64)
    tokens = _draw_from_head(ids, cumulative, needed, uniform)
    # Whether the head reaches far enough is asked of the row alone, so that its path does not depend on the batch.
    (large,) = np.nonzero(needed > cumulative[:, -1])
    if large.size:
        tokens[large] = _draw_by_buckets(scores[large], weights[large], top_p[large], uniform[large])
    return tokens


def block_sums(weights: NDArray[np.float32]) -> FloatArray:
    """Float64 sums [rows, blocks] of consecutive blocks of each row."""
    starts = np.arange(0, weights.shape[1], BLOCK_SIZE)
    return np.add.reduceat(weights, starts, axis=1).astype(np.float64)


def _draw_from_head(ids: IntArray, cumulative: FloatArray, needed: FloatArray, uniform: FloatArray) -> IntArray:
    """Draw from tokens sorted by weight, cut off at the first whose cumulative weight is at least `needed`."""
    last = np.minimum((cumulative < needed[:, None]).sum(axis=1), cumulative.shape[1] - 1)
    rows = np.arange(len(ids))
    place = _first_above(cumulative, _targets(uniform, cumulative[rows, last]))
    return np.asarray(ids[rows, place])


def _draw_by_buckets(scores: Tensor, weights: NDArray[np.float32], top_p: FloatArray, uniform: FloatArray) -> IntArray:
    """`draw_top_p` for nuclei of any size: tokens are dealt into buckets of score, of which two are looked into.

    One is where the nucleus ends, the other where the draw falls. The rest of the row is never sorted.
    """
    bucket_of = (scores * -BUCKETS_PER_UNIT).clamp_(max=NUM_BUCKETS - 1).to(torch.int64)
    masses = torch.zeros(len(scores), NUM_BUCKETS, dtype=torch.float64)
    masses.scatter_add_(1, bucket_of, torch.from_numpy(weights.astype(np.float64)))
    cumulative = masses.numpy().cumsum(axis=1)
    tokens = np.empty(len(scores), dtype=np.int64)
    for row, (bounds, buckets, row_scores, row_weights) in enumerate(
        zip(cumulative, bucket_of.numpy(), scores.numpy(), weights, strict=True)
    ):
        needed = top_p[row] * bounds[-1]
        edge = min(int(np.searchsorted(bounds, needed)), NUM_BUCKETS - 1)
        ids, inside = _open_bucket(edge, bounds, buckets, row_scores, row_weights)
        mass = inside[min(int(np.searchsorted(inside, needed)), len(inside) - 1)]
        target = min(uniform[row] * mass, np.nextafter(mass, 0.0))
        drawn = int(np.searchsorted(bounds, target, side="right"))
        if drawn < edge:
            ids, inside = _open_bucket(drawn, bounds, buckets, row_scores, row_weights)
            target = min(target, np.nextafter(inside[-1], 0.0))
        tokens[row] = ids[np.searchsorted(inside, target, side="right")]
    return tokens


def _open_bucket(
    bucket: int,
    bounds: FloatArray,
    buckets: IntArray,
    scores: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> tuple[IntArray, FloatArray]:
    """The ids of one bucket of a row, highest score first, and the row's cumulative weight at each."""
    ids = np.flatnonzero(buckets == bucket)
    ids = ids[np.argsort(-scores[ids], kind="stable")]
    before = bounds[bucket - 1] if bucket else 0.0
    return ids, before + weights[ids].cumsum(dtype=np.float64)


def _drop_unlikely(weights: NDArray[Any], min_p: MinP) -> None:
    """Take the weight of tokens less than `min_p` times as likely as the highest, whose weight is 1."""
    if min_p is not None:
        weights *= weights >= min_p[:, None]


def _targets(uniform: FloatArray, mass: FloatArray) -> FloatArray:
    """Points in [0, mass): the product alone may round up to the mass itself."""
    return np.minimum(uniform * mass, np.nextafter(mass, 0.0))


def _first_above(cumulative: FloatArray, target: FloatArray) -> IntArray:
    """Index of the first entry of each row that exceeds its target; the weight added there is never zero."""
    return np.asarray((cumulative <= target[:, None]).sum(axis=1))
