"""Sampling without sorting: one token per row of logits, without the host.

A row samples the same token as `quire.sampling` on a CPU: both use the same uniform number
(`quire.sampling.uniforms`), laid over the same tokens in the same order. Without a filter that is the order of ids.
With a filter it is the ranking, highest first and lowest id first among equals; top-k, top-p and min-p each keep its
head. The two devices differ by rounding alone, so their tokens differ only where the number falls on a boundary.

Rows are processed in chunks, one program each, so that one row of a large vocabulary keeps the whole device busy. A
first kernel finds the highest logit of each chunk and its id, a second one sums the chunk's weights (`ranking`). Then
one program per row has little to do: the most likely token is that of the highest chunk, and a sample without filters
reads one more chunk.

With a filter, chunks count and weigh their tokens in ranges of the distance from the peak. Sums over all chunks show
beyond which range the ranking is not needed. All chunks together list the closer tokens: a few, where k or the nucleus
is small. In this list, one program finds a rank by the bits of the distance.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.triton.configs import CHUNK, CHUNK_WARPS, ROW_WARPS
from quire.kernels.triton.logprobs import report
from quire.kernels.triton.ranking import (
    NUM_RANGES,
    RANGES,
    distances_of,
    find_distance,
    has_top_k,
    mix_bits,
    nth_at,
    ranges_of,
    sample_by_id,
    weight_closer_than,
    weights_of,
)

__all__ = ["SamplingRows", "report", "sample"]

PART = 256
"""Tokens of a chunk that are counted into ranges together."""
BLOCK = 512
"""Tokens that a program of a whole row takes at a time."""
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of R rows, on the device. For a CUDA graph the tensors are fixed memory."""

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
    """[R] int64: position of the token to sample, in its stream."""


@triton.jit
def peaks_kernel(logits, chunk_peaks, chunk_ids, stride, size, num_chunks, CHUNK: tl.constexpr):
    """The highest logit of a chunk, NaN if the chunk holds NaN, and the lowest id with it."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    row = logits + index.to(tl.int64) * stride
    values = tl.load(row + token, mask=token < size, other=float("-inf")).to(tl.float32)
    peak = tl.max(values, 0)
    first = tl.min(tl.where((values == peak) & (token < size), token, size), 0)
    # A maximum may ignore NaN.
    peak = tl.where(tl.max((values != values).to(tl.int32), 0) > 0, float("nan"), peak)
    tl.store(chunk_peaks + index * num_chunks + chunk, peak)
    tl.store(chunk_ids + index * num_chunks + chunk, first)


@triton.jit
def _peaks_of_row(chunk_peaks, index, num_chunks, CHUNKS: tl.constexpr):
    """The peak of each chunk and that of the row, which is not finite for a row without a sample."""
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
    """The weight of a chunk of a random row; for a filtered row also the weight and number of tokens in each range."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + index)
    _, peak = _peaks_of_row(chunk_peaks, index, num_chunks, CHUNKS)
    if (temperature == 0) | ((peak - peak) != 0):
        return
    row = logits + index.to(tl.int64) * stride
    min_p = tl.load(min_ps + index)
    own = index * num_chunks + chunk
    if has_top_k(tl.load(top_ks + index), size) | (tl.load(top_ps + index) < 1):
        place = tl.arange(0, RANGES)
        counts = tl.zeros([PART, RANGES], tl.int32)
        dealt = tl.zeros([PART, RANGES], tl.float32)
        for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, size), PART):
            token = start + tl.arange(0, PART)
            distance = distances_of(row, token, token < size, peak, temperature)
            inside = (ranges_of(distance)[:, None] == place[None, :]) & (token < size)[:, None]
            counts += inside.to(tl.int32)
            dealt += tl.where(inside, weights_of(distance, min_p)[:, None], 0.0)
        sums = tl.sum(dealt.to(tl.float64), 0)
        tl.store(range_counts + own * RANGES + place, tl.sum(counts, 0))
        tl.store(range_weights + own * RANGES + place, sums)
        tl.store(chunk_weights + own, tl.sum(sums, 0))
    else:
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        weights = weights_of(distances_of(row, token, token < size, peak, temperature), min_p)
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
    """Lists the ids of a filtered row that the filters may keep, and some more, in ascending order. Each chunk writes
    its ids after those of the chunks before it."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + index)
    top_k = tl.load(top_ks + index)
    filters_k = has_top_k(top_k, size)
    top_p = tl.load(top_ps + index)
    _, peak = _peaks_of_row(chunk_peaks, index, num_chunks, CHUNKS)
    if (temperature == 0) | ((peak - peak) != 0) | ((filters_k | (top_p < 1)) == 0):
        return
    place, others = tl.arange(0, RANGES), tl.arange(0, CHUNKS)
    at = (index * num_chunks + others)[:, None] * RANGES + place[None, :]
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
        distance = distances_of(row, token, token < size, peak, temperature)
        kept = (ranges_of(distance) <= last) & (token < size)
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
    uniform = (mix_bits(key + (position + 1) * _GAMMA) >> 11).to(tl.float64) * 1.1102230246251565e-16
    sums = tl.load(chunk_weights + index * num_chunks + chunk, mask=chunk < num_chunks, other=0.0)
    kept = tl.sum(sums, 0)
    filters_k = has_top_k(top_k, size)
    if filters_k | (top_p < 1):
        own = ids + index.to(tl.int64) * size
        count = tl.load(num_ids + index)
        if filters_k:
            bits, closer = find_distance(
                row, own, count, peak, temperature, 0.0, top_k.to(tl.float64), True, False, BLOCK
            )
            kept = weight_closer_than(row, own, count, peak, temperature, min_p, bits, BLOCK)
            distance = bits.to(tl.float32, bitcast=True)
            kept += (top_k.to(tl.float64) - closer) * weights_of(distance, min_p).to(tl.float64)
        if top_p < 1:
            needed = top_p * kept
            bits, closer = find_distance(row, own, count, peak, temperature, min_p, needed, False, False, BLOCK)
            weight = weights_of(bits.to(tl.float32, bitcast=True), min_p).to(tl.float64)
            at_edge = tl.maximum(tl.ceil((needed - closer) / weight), 1.0)
            kept = tl.minimum(kept, closer + at_edge * weight)
        target = uniform * kept
        bits, closer = find_distance(row, own, count, peak, temperature, min_p, target, False, True, BLOCK)
        weight = weights_of(bits.to(tl.float32, bitcast=True), min_p).to(tl.float64)
        number = tl.floor(tl.maximum(target - closer, 0.0) / weight).to(tl.int32)
        tl.store(tokens + index, nth_at(row, own, count, peak, temperature, bits, number, BLOCK))
    else:
        target = uniform * kept
        # Rounding may put the target beyond the sum: then take the last chunk that is not empty.
        last = tl.max(tl.where(sums > 0, chunk, 0), 0)
        chosen = tl.minimum(tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32), 0), last)
        before = tl.sum(tl.where(chunk < chosen, sums, 0.0), 0)
        start = chosen * CHUNK
        token = sample_by_id(row, start, start + CHUNK, size, peak, temperature, min_p, target - before, BLOCK)
        tl.store(tokens + index, token)


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
