"""Sampling without sorting: one token per row of logits, and log-probabilities, without the host.

A row draws the token that `quire.sampling` draws for it on a CPU: the same uniform number (`quire.sampling.uniforms`),
laid over the same tokens in the same order. Without a filter that is the order of ids; with one it is that of the
ranking, highest first and lowest id first among equals, of which top-k, top-p and min-p each keep a head. What the two
devices compute differs by rounding alone, so they differ in a token only where the number falls on a boundary.

Rows are looked at in chunks, one program each, so that one row of a large vocabulary keeps the whole device busy: for
the highest logit of a chunk and who has it, then for the sum of its weights exp(-d), where d = (peak - logit) /
temperature. One program a row has little left to do: the most likely token is that of the highest chunk, and an
unfiltered draw looks at one chunk more.

With a filter, chunks count their tokens and weigh them in ranges of d, whose sums over all chunks tell beyond which
range the ranking need not be known. What is closer is listed, by all chunks at once: a few tokens where k or the
nucleus is small. In this list the one program finds a rank by the bits of d, which is never negative, so that the bits
ordered as a whole number are ordered as d is: eight passes find them four at a time, each summing weights in sixteen
ranges. Sums are float64 over short float32 parts.

Log-probabilities work alike: every chunk has its sum and its most likely tokens, of which one program takes the first.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
"""Tokens of a program that takes a part of a row."""
CHUNK_WARPS = 8
NUM_RANGES = 32
PART = 256
"""Tokens of a chunk that are dealt into ranges together."""
BLOCK = 512
"""Tokens looked at together by a program that takes a whole row."""
ROW_WARPS = 8

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_NUM_RANGES = tl.constexpr(NUM_RANGES)
_FIRST_RANGE = tl.constexpr((0x3E800000 >> 21) - 1)
_NO_KEY = tl.constexpr(-(2**63))


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """What each row asks for, as tensors on the device, R rows. Fixed memory may be given, for a CUDA graph."""

    temperature: Tensor
    """[R] float32; 0 takes the most likely token."""
    top_k: Tensor
    """[R] int32; 0 or the vocabulary's size: all."""
    top_p: Tensor
    """[R] float64; 1: all."""
    min_p: Tensor
    """[R] float32; 0: all."""
    keys: Tensor
    """[R] int64: the bits of `quire.sampling.uniforms.stream_keys`."""
    positions: Tensor
    """[R] int64: of the token to be drawn, in its stream."""


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _filters_k(top_k, size):
    return (top_k > 0) & (top_k < size)


@triton.jit
def _distances(row, token, exists, peak, temperature):
    """How far some tokens' scores lie below the highest; infinite where there is no token."""
    logits = tl.load(row + token, mask=exists, other=float("-inf")).to(tl.float32)
    return tl.div_rn(peak - logits, temperature)


@triton.jit
def _listed_distances(row, ids, place, count, peak, temperature):
    exists = place < count
    token = tl.load(ids + place, mask=exists, other=0)
    return _distances(row, token, exists, peak, temperature)


@triton.jit
def _weights(distance, min_p):
    weights = tl.exp(-distance)
    return tl.where(weights >= min_p, weights, 0.0)


@triton.jit
def _ranges(distance):
    """Which range each distance is in: up to 1/4, then four to each doubling, and all from 48 on."""
    place = (distance.to(tl.int32, bitcast=True) >> 21) - _FIRST_RANGE
    return tl.minimum(tl.maximum(place, 0), _NUM_RANGES - 1)


@triton.jit
def _find(
    row, ids, count, peak, temperature, min_p, target, BY_COUNT: tl.constexpr, EXCEED: tl.constexpr, BLOCK: tl.constexpr
):
    """The bits of the distance at which the weight (or number) of the listed tokens, in the order of the ranking,
    reaches the target, or exceeds it, and the weight (or number) of all that are closer."""
    place = tl.arange(0, 16)
    bits = tl.zeros([], tl.int32)
    below = tl.zeros([], tl.float64)
    for step in range(8):
        shift = 28 - 4 * step
        sums = tl.zeros([16], tl.float64)
        for start in range(0, count, BLOCK):
            listed = start + tl.arange(0, BLOCK)
            distance = _listed_distances(row, ids, listed, count, peak, temperature)
            if BY_COUNT:
                weights = tl.where(listed < count, 1.0, 0.0)
            else:
                weights = _weights(distance, min_p)
            digit = (distance.to(tl.int32, bitcast=True) >> shift) - (bits >> shift)
            inside = tl.where(digit[:, None] == place[None, :], weights[:, None], 0.0)
            sums += tl.sum(inside, 0).to(tl.float64)
        reached = below + tl.cumsum(sums, 0)
        short = reached <= target if EXCEED else reached < target
        # Rounding may leave the target beyond everything: then the last range that holds anything is meant.
        last = tl.max(tl.where(sums > 0, place, 0), 0)
        chosen = tl.minimum(tl.sum(short.to(tl.int32), 0), last)
        below += tl.sum(tl.where(place < chosen, sums, 0.0), 0)
        bits += chosen << shift
    return bits, below


@triton.jit
def _weight_closer_than(row, ids, count, peak, temperature, min_p, bits, BLOCK: tl.constexpr):
    total = tl.zeros([], tl.float64)
    for start in range(0, count, BLOCK):
        distance = _listed_distances(row, ids, start + tl.arange(0, BLOCK), count, peak, temperature)
        weights = tl.where(distance.to(tl.int32, bitcast=True) < bits, _weights(distance, min_p), 0.0)
        total += tl.sum(weights, 0).to(tl.float64)
    return total


@triton.jit
def _nth_at(row, ids, count, peak, temperature, bits, n, BLOCK: tl.constexpr):
    """The id of the token number n, from 0, of those at one distance; of the last if there are fewer."""
    found = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        listed = start + tl.arange(0, BLOCK)
        distance = _listed_distances(row, ids, listed, count, peak, temperature)
        equal = ((distance.to(tl.int32, bitcast=True) == bits) & (listed < count)).to(tl.int32)
        number = before + tl.cumsum(equal, 0) - 1
        found = tl.maximum(found, tl.max(tl.where((equal > 0) & (number <= n), listed, 0), 0))
        before += tl.sum(equal, 0)
    return tl.load(ids + found)


@triton.jit
def _draw_by_id(row, start, end, size, peak, temperature, min_p, target, BLOCK: tl.constexpr):
    """The first token from `start` on at which the weight of all up to it exceeds the target; the last with any weight
    before `end` if none does."""
    found = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.float64)
    for begin in range(start, end, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        weights = _weights(_distances(row, token, token < size, peak, temperature), min_p).to(tl.float64)
        reached = before + tl.cumsum(weights, 0)
        # Tokens are passed as long as the sum before them does not exceed the target; the last of these is drawn.
        candidate = (weights > 0) & (reached - weights <= target)
        found = tl.maximum(found, tl.max(tl.where(candidate, token, 0), 0))
        before += tl.sum(weights, 0)
    return found


@triton.jit
def peaks_kernel(logits, chunk_peaks, chunk_ids, stride, size, num_chunks, CHUNK: tl.constexpr):
    """Of a chunk its highest logit, NaN if it holds any, and the lowest id that has it."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    row = logits + index.to(tl.int64) * stride
    values = tl.load(row + token, mask=token < size, other=float("-inf")).to(tl.float32)
    peak = tl.max(values, 0)
    first = tl.min(tl.where((values == peak) & (token < size), token, size), 0)
    # A maximum may pass over NaN.
    peak = tl.where(tl.max((values != values).to(tl.int32), 0) > 0, float("nan"), peak)
    tl.store(chunk_peaks + index * num_chunks + chunk, peak)
    tl.store(chunk_ids + index * num_chunks + chunk, first)


@triton.jit
def _peaks_of_row(chunk_peaks, index, num_chunks, CHUNKS: tl.constexpr):
    """Of each chunk, and of all: not finite for a row that draws nothing."""
    chunk = tl.arange(0, CHUNKS)
    peaks = tl.load(chunk_peaks + index * num_chunks + chunk, mask=chunk < num_chunks, other=float("-inf"))
    unsound = tl.max((peaks != peaks).to(tl.int32), 0) > 0
    return peaks, tl.where(unsound, float("nan"), tl.max(peaks, 0))


@triton.jit
def weights_kernel(
    logits,
    chunk_peaks,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    chunk_weights,
    range_weights,
    range_counts,
    stride,
    size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PART: tl.constexpr,
):
    """The weight of a chunk, of rows that draw; of filtered ones also the weight and number of tokens in each range."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + index)
    _, peak = _peaks_of_row(chunk_peaks, index, num_chunks, CHUNKS)
    if (temperature == 0) | ((peak - peak) != 0):
        return
    row = logits + index.to(tl.int64) * stride
    min_p = tl.load(min_ps + index)
    own = index * num_chunks + chunk
    if _filters_k(tl.load(top_ks + index), size) | (tl.load(top_ps + index) < 1):
        place = tl.arange(0, _NUM_RANGES)
        counts = tl.zeros([PART, _NUM_RANGES], tl.int32)
        dealt = tl.zeros([PART, _NUM_RANGES], tl.float32)
        for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, size), PART):
            token = start + tl.arange(0, PART)
            distance = _distances(row, token, token < size, peak, temperature)
            inside = (_ranges(distance)[:, None] == place[None, :]) & (token < size)[:, None]
            counts += inside.to(tl.int32)
            dealt += tl.where(inside, _weights(distance, min_p)[:, None], 0.0)
        sums = tl.sum(dealt.to(tl.float64), 0)
        tl.store(range_counts + own * _NUM_RANGES + place, tl.sum(counts, 0))
        tl.store(range_weights + own * _NUM_RANGES + place, sums)
        tl.store(chunk_weights + own, tl.sum(sums, 0))
    else:
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        weights = _weights(_distances(row, token, token < size, peak, temperature), min_p)
        tl.store(chunk_weights + own, tl.sum(weights.to(tl.float64), 0))


@triton.jit
def list_kernel(
    logits,
    chunk_peaks,
    range_weights,
    range_counts,
    temperatures,
    top_ks,
    top_ps,
    ids,
    num_ids,
    stride,
    size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of a filtered row the ids, in rising order, that the filters may leave, and some more; each chunk lists its own
    behind those of the chunks before it."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + index)
    top_k = tl.load(top_ks + index)
    filters_k = _filters_k(top_k, size)
    top_p = tl.load(top_ps + index)
    _, peak = _peaks_of_row(chunk_peaks, index, num_chunks, CHUNKS)
    if (temperature == 0) | ((peak - peak) != 0) | ((filters_k | (top_p < 1)) == 0):
        return
    place, others = tl.arange(0, _NUM_RANGES), tl.arange(0, CHUNKS)
    at = (index * num_chunks + others)[:, None] * _NUM_RANGES + place[None, :]
    exists = (others < num_chunks)[:, None] & (place >= 0)[None, :]
    counts = tl.load(range_counts + at, mask=exists, other=0)
    if filters_k:
        last = tl.sum((tl.cumsum(tl.sum(counts, 0), 0) < top_k).to(tl.int32), 0)
    else:
        reached = tl.cumsum(tl.sum(tl.load(range_weights + at, mask=exists, other=0.0), 0), 0)
        needed = top_p * tl.max(reached, 0)
        last = tl.sum((reached < needed).to(tl.int32), 0)
    listed = tl.sum(tl.where(place[None, :] <= last, counts, 0), 1)
    before = tl.sum(tl.where(others < chunk, listed, 0), 0)
    if chunk == 0:
        tl.store(num_ids + index, tl.sum(listed, 0))
    if tl.sum(tl.where(others == chunk, listed, 0), 0) > 0:
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        row = logits + index.to(tl.int64) * stride
        distance = _distances(row, token, token < size, peak, temperature)
        kept = (_ranges(distance) <= last) & (token < size)
        to = before + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(ids + index.to(tl.int64) * size + to, token, mask=kept)


@triton.jit
def sample_kernel(
    logits,
    chunk_peaks,
    chunk_ids,
    chunk_weights,
    ids,
    num_ids,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    keys,
    positions,
    tokens,
    peaks,
    stride,
    size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    chunk = tl.arange(0, CHUNKS)
    peaks_of_chunks, peak = _peaks_of_row(chunk_peaks, index, num_chunks, CHUNKS)
    tl.store(peaks + index, peak)
    if (peak - peak) != 0:
        tl.store(tokens + index, 0)
        return

    temperature = tl.load(temperatures + index)
    if temperature == 0:
        first = tl.min(tl.where(peaks_of_chunks == peak, chunk, CHUNKS), 0)
        tl.store(tokens + index, tl.load(chunk_ids + index * num_chunks + first))
        return
    top_k = tl.load(top_ks + index)
    top_p = tl.load(top_ps + index)
    min_p = tl.load(min_ps + index)
    key = tl.load(keys + index).to(tl.uint64, bitcast=True)
    position = tl.load(positions + index).to(tl.uint64, bitcast=True)
    uniform = (_mix(key + (position + 1) * _GAMMA) >> 11).to(tl.float64) * 1.1102230246251565e-16
    sums = tl.load(chunk_weights + index * num_chunks + chunk, mask=chunk < num_chunks, other=0.0)
    kept = tl.sum(sums, 0)
    filters_k = _filters_k(top_k, size)
    if filters_k | (top_p < 1):
        own = ids + index.to(tl.int64) * size
        count = tl.load(num_ids + index)
        if filters_k:
            bits, closer = _find(row, own, count, peak, temperature, 0.0, top_k.to(tl.float64), True, False, BLOCK)
            kept = _weight_closer_than(row, own, count, peak, temperature, min_p, bits, BLOCK)
            distance = bits.to(tl.float32, bitcast=True)
            kept += (top_k.to(tl.float64) - closer) * _weights(distance, min_p).to(tl.float64)
        if top_p < 1:
            needed = top_p * kept
            bits, closer = _find(row, own, count, peak, temperature, min_p, needed, False, False, BLOCK)
            weight = _weights(bits.to(tl.float32, bitcast=True), min_p).to(tl.float64)
            at_edge = tl.maximum(tl.ceil((needed - closer) / weight), 1.0)
            kept = tl.minimum(kept, closer + at_edge * weight)
        target = uniform * kept
        bits, closer = _find(row, own, count, peak, temperature, min_p, target, False, True, BLOCK)
        weight = _weights(bits.to(tl.float32, bitcast=True), min_p).to(tl.float64)
        number = tl.floor(tl.maximum(target - closer, 0.0) / weight).to(tl.int32)
        tl.store(tokens + index, _nth_at(row, own, count, peak, temperature, bits, number, BLOCK))
    else:
        target = uniform * kept
        # Rounding may leave the target beyond everything: then the last chunk that holds anything is meant.
        last = tl.max(tl.where(sums > 0, chunk, 0), 0)
        chosen = tl.minimum(tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32), 0), last)
        before = tl.sum(tl.where(chunk < chosen, sums, 0.0), 0)
        start = chosen * CHUNK
        token = _draw_by_id(row, start, start + CHUNK, size, peak, temperature, min_p, target - before, BLOCK)
        tl.store(tokens + index, token)


@triton.jit
def _rank_keys(values, token, exists):
    """Whole numbers that are ordered as the ranking is: by value, and by the lower id among equals. All differ."""
    values = tl.where(values == 0, 0.0, values)  # of which there are two
    bits = values.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - token).to(tl.int64)
    return tl.where(exists, keys, _NO_KEY)


@triton.jit
def chunk_reports_kernel(
    logits,
    tokens,
    nums_reported,
    chunk_peaks,
    chunk_sums,
    chunk_ahead,
    chunk_leaders,
    stride,
    size,
    num_chunks,
    CHUNK: tl.constexpr,
    LEADERS: tl.constexpr,
):
    """Of a chunk, for rows that report: its peak and the sum of exp(logit - peak), how many tokens come before the
    chosen one, and its most likely tokens."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    num_reported = tl.load(nums_reported + index)
    if num_reported == 0:
        return
    row = logits + index.to(tl.int64) * stride
    own_token = tl.load(tokens + index)
    own = tl.load(row + own_token).to(tl.float32)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    exists = token < size
    values = tl.load(row + token, mask=exists, other=float("-inf")).to(tl.float32)
    peak = tl.max(values, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    ahead = (values > own) | ((values == own) & (token < own_token))
    place = index * num_chunks + chunk
    tl.store(chunk_peaks + place, peak)
    tl.store(chunk_sums + place, tl.sum(tl.exp(values - shift).to(tl.float64), 0))
    tl.store(chunk_ahead + place, tl.sum((ahead & exists).to(tl.int32), 0))
    keys = _rank_keys(values, token, exists)
    leader = tl.max(keys, 0)
    for number in range(num_reported - 1):
        tl.store(chunk_leaders + place.to(tl.int64) * LEADERS + number, leader)
        leader = tl.max(tl.where(keys < leader, keys, _NO_KEY), 0)


@triton.jit(do_not_specialize=["num_rows"])  # or batches of one would be compiled anew
def reports_kernel(
    logits,
    tokens,
    nums_reported,
    chunk_peaks,
    chunk_sums,
    chunk_ahead,
    chunk_leaders,
    reports,
    num_rows,
    stride,
    num_chunks,
    CHUNKS: tl.constexpr,
    LEADERS: tl.constexpr,
    MAX_REPORTED: tl.constexpr,
):
    """A row's report from its chunks'."""
    index = tl.program_id(0)
    num_reported = tl.load(nums_reported + index)
    if num_reported == 0:
        return
    chunk = tl.arange(0, CHUNKS)
    exists = chunk < num_chunks
    place = index * num_chunks + chunk
    peaks = tl.load(chunk_peaks + place, mask=exists, other=float("-inf"))
    peak = tl.max(peaks, 0)
    sums = tl.load(chunk_sums + place, mask=exists, other=0.0)
    total = tl.sum(sums * tl.exp(peaks - peak).to(tl.float64), 0)
    normaliser = peak.to(tl.float64) + tl.log(total)
    rank = 1 + tl.sum(tl.load(chunk_ahead + place, mask=exists, other=0), 0)
    own = tl.load(logits + index.to(tl.int64) * stride + tl.load(tokens + index)).to(tl.float64)
    out = reports + index
    tl.store(out, rank)
    tl.store(out + num_rows, (own - normaliser).to(tl.float32).to(tl.int32, bitcast=True))
    number = tl.arange(0, LEADERS)
    found = exists[:, None] & (number < num_reported - 1)[None, :]
    keys = tl.load(chunk_leaders + place.to(tl.int64)[:, None] * LEADERS + number[None, :], mask=found, other=_NO_KEY)
    for following in range(num_reported - 1):
        key = tl.max(tl.max(keys, 1), 0)
        keys = tl.where(keys < key, keys, _NO_KEY)
        ordered = (key >> 32).to(tl.int32)
        value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        logprob = (value.to(tl.float64) - normaliser).to(tl.float32)
        tl.store(out + (2 + following) * num_rows, 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32))
        tl.store(out + (2 + MAX_REPORTED + following) * num_rows, logprob.to(tl.int32, bitcast=True))


def sample(logits: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """logits [R, vocabulary] in any float type, after edits and penalties -> token ids [R] int32, peaks [R] float32.

    A row whose peak is not finite, NaN if it holds any, has no token: its id is 0 and void.
    """
    num_rows, size = logits.shape
    num_chunks = triton.cdiv(size, CHUNK)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=logits.device)

    tokens, peaks = empty(torch.int32), empty(torch.float32)
    if not num_rows:
        return tokens, peaks
    chunk_peaks, chunk_ids = empty(torch.float32, num_chunks), empty(torch.int32, num_chunks)
    chunk_weights = empty(torch.float64, num_chunks)
    range_weights = empty(torch.float64, num_chunks, NUM_RANGES)
    range_counts = empty(torch.int32, num_chunks, NUM_RANGES)
    ids, num_ids = empty(torch.int32, size), empty(torch.int32)
    grid, shape = (num_rows, num_chunks), (logits.stride(0), size, num_chunks)
    chunks = triton.next_power_of_2(num_chunks)
    peaks_kernel[grid](logits, chunk_peaks, chunk_ids, *shape, CHUNK=CHUNK, num_warps=CHUNK_WARPS)
    weights_kernel[grid](
        logits,
        chunk_peaks,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        chunk_weights,
        range_weights,
        range_counts,
        *shape,
        CHUNK=CHUNK,
        CHUNKS=chunks,
        PART=PART,
        num_warps=CHUNK_WARPS,
    )
    list_kernel[grid](
        logits,
        chunk_peaks,
        range_weights,
        range_counts,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        ids,
        num_ids,
        *shape,
        CHUNK=CHUNK,
        CHUNKS=chunks,
        num_warps=CHUNK_WARPS,
    )
    sample_kernel[(num_rows,)](
        logits,
        chunk_peaks,
        chunk_ids,
        chunk_weights,
        ids,
        num_ids,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.keys,
        rows.positions,
        tokens,
        peaks,
        *shape,
        CHUNK=CHUNK,
        CHUNKS=chunks,
        BLOCK=BLOCK,
        num_warps=ROW_WARPS,
    )
    return tokens, peaks


def report(logits: Tensor, tokens: Tensor, nums_reported: Tensor, max_reported: int) -> Tensor:
    """logits [R, vocabulary], tokens [R] int32, nums_reported [R] int32 -> [2 + 2 max_reported, R] int32, of each row
    the rank of its token, from 1; the bits of its log-probability as float32; the ids of the most likely tokens, and
    the bits of their log-probabilities.

    A row has a report of `nums_reported` tokens, its own the first of them; 0: none, and its column is void.
    """
    num_rows, size = logits.shape
    num_chunks = triton.cdiv(size, CHUNK)
    leaders = triton.next_power_of_2(max(1, max_reported))

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(num_rows, num_chunks, *shape, dtype=dtype, device=logits.device)

    reports = torch.empty(2 + 2 * max_reported, num_rows, dtype=torch.int32, device=logits.device)
    if not num_rows:
        return reports
    asked = (logits, tokens, nums_reported)
    of_chunks = (empty(torch.float32), empty(torch.float64), empty(torch.int32), empty(torch.int64, leaders))
    chunk_reports_kernel[(num_rows, num_chunks)](
        *asked, *of_chunks, logits.stride(0), size, num_chunks, CHUNK=CHUNK, LEADERS=leaders, num_warps=CHUNK_WARPS
    )
    reports_kernel[(num_rows,)](
        *asked,
        *of_chunks,
        reports,
        num_rows,
        logits.stride(0),
        num_chunks,
        CHUNKS=triton.next_power_of_2(num_chunks),
        LEADERS=leaders,
        MAX_REPORTED=max_reported,
        num_warps=ROW_WARPS,
    )
    return reports
