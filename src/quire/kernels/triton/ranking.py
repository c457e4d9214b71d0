"""How far the tokens of a row are below its most likely one, and the search for a token by rank or by weight.

The distance of a token is d = (peak - logit) / temperature, and its weight exp(-d). A distance is never negative, so
its bits, read as an integer, are ordered like d. A search finds them four at a time: each of eight passes sums weights
in sixteen ranges. Sums are float64 over short float32 parts.
"""

import triton
import triton.language as tl

NUM_RANGES = 32
RANGES = tl.constexpr(NUM_RANGES)
_FIRST_RANGE = tl.constexpr((0x3E800000 >> 21) - 1)


@triton.jit
def mix_bits(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def has_top_k(top_k, size):
    return (top_k > 0) & (top_k < size)


@triton.jit
def distances_of(row, token, exists, peak, temperature):
    """How far the scores of some tokens are below the highest; infinite where there is no token."""
    logits = tl.load(row + token, mask=exists, other=float("-inf")).to(tl.float32)
    return tl.div_rn(peak - logits, temperature)


@triton.jit
def listed_distances(row, ids, place, count, peak, temperature):
    exists = place < count
    token = tl.load(ids + place, mask=exists, other=0)
    return distances_of(row, token, exists, peak, temperature)


@triton.jit
def weights_of(distance, min_p):
    weights = tl.exp(-distance)
    return tl.where(weights >= min_p, weights, 0.0)


@triton.jit
def ranges_of(distance):
    """The range of each distance: up to 1/4, then four for each doubling, and one for all from 48 on."""
    place = (distance.to(tl.int32, bitcast=True) >> 21) - _FIRST_RANGE
    return tl.minimum(tl.maximum(place, 0), RANGES - 1)


@triton.jit
def find_distance(
    row, ids, count, peak, temperature, min_p, target, BY_COUNT: tl.constexpr, EXCEED: tl.constexpr, BLOCK: tl.constexpr
):
    """The bits of the distance at which the summed weight (BY_COUNT: number) of the listed tokens, best first, reaches
    the target (EXCEED: exceeds it), and the weight (or number) of all closer tokens."""
    place = tl.arange(0, 16)
    bits = tl.zeros([], tl.int32)
    below = tl.zeros([], tl.float64)
    for step in range(8):
        shift = 28 - 4 * step
        sums = tl.zeros([16], tl.float64)
        for start in range(0, count, BLOCK):
            listed = start + tl.arange(0, BLOCK)
            distance = listed_distances(row, ids, listed, count, peak, temperature)
            if BY_COUNT:
                weights = tl.where(listed < count, 1.0, 0.0)
            else:
                weights = weights_of(distance, min_p)
            digit = (distance.to(tl.int32, bitcast=True) >> shift) - (bits >> shift)
            inside = tl.where(digit[:, None] == place[None, :], weights[:, None], 0.0)
            sums += tl.sum(inside, 0).to(tl.float64)
        reached = below + tl.cumsum(sums, 0)
        short = reached <= target if EXCEED else reached < target
        # Rounding may put the target beyond the sum: then take the last range that is not empty.
        last = tl.max(tl.where(sums > 0, place, 0), 0)
        chosen = tl.minimum(tl.sum(short.to(tl.int32), 0), last)
        below += tl.sum(tl.where(place < chosen, sums, 0.0), 0)
        bits += chosen << shift
    return bits, below


@triton.jit
def weight_closer_than(row, ids, count, peak, temperature, min_p, bits, BLOCK: tl.constexpr):
    total = tl.zeros([], tl.float64)
    for start in range(0, count, BLOCK):
        distance = listed_distances(row, ids, start + tl.arange(0, BLOCK), count, peak, temperature)
        weights = tl.where(distance.to(tl.int32, bitcast=True) < bits, weights_of(distance, min_p), 0.0)
        total += tl.sum(weights, 0).to(tl.float64)
    return total


@triton.jit
def nth_at(row, ids, count, peak, temperature, bits, n, BLOCK: tl.constexpr):
    """The id of the n-th token, from 0, at one distance; the last one's if there are fewer."""
    found = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        listed = start + tl.arange(0, BLOCK)
        distance = listed_distances(row, ids, listed, count, peak, temperature)
        equal = ((distance.to(tl.int32, bitcast=True) == bits) & (listed < count)).to(tl.int32)
        number = before + tl.cumsum(equal, 0) - 1
        found = tl.maximum(found, tl.max(tl.where((equal > 0) & (number <= n), listed, 0), 0))
        before += tl.sum(equal, 0)
    return tl.load(ids + found)


@triton.jit
def sample_by_id(row, start, end, size, peak, temperature, min_p, target, BLOCK: tl.constexpr):
    """The first token from `start` on at which the summed weight exceeds the target; if there is none, the last token
    before `end` with a weight."""
    found = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.float64)
    for begin in range(start, end, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        weights = weights_of(distances_of(row, token, token < size, peak, temperature), min_p).to(tl.float64)
        reached = before + tl.cumsum(weights, 0)
        # A candidate is a token before which the sum does not exceed the target; the last candidate is the sample.
        candidate = (weights > 0) & (reached - weights <= target)
        found = tl.maximum(found, tl.max(tl.where(candidate, token, 0), 0))
        before += tl.sum(weights, 0)
    return found
