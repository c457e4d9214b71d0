"""Sampling without sorting: one token per row of logits, and its log-probability, without the host.

A row draws the token that `quire.sampling` draws for it on a CPU: the same uniform number (`quire.sampling.uniforms`),
laid over the same tokens in the same order. Without a filter that is the order of ids; with one it is that of the
ranking, highest first and lowest id first among equals, of which top-k, top-p and min-p each keep a head. What the two
devices compute differs by rounding alone, so they differ in a token only where the number falls on a boundary.

Two launches look at all rows in chunks, one program each: the highest logit of a chunk and who has it, then the sum of
its weights exp(-d), where d = (peak - logit) / temperature. A third, with one program a row, has little left to do: the
most likely token is that of the highest chunk, and an unfiltered draw looks at one chunk more.

With a filter it finds a rank by the bits of the score: d is never negative, and the bits of d ordered as a whole number
are ordered as d is. Eight passes over the row find them four at a time, each summing the weights of the tokens in
sixteen ranges; chunks whose highest logit lies below them are passed over, which after two passes are nearly all. Sums
are float64 over short float32 parts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.triton.configs import architecture_of

CHUNK = 4096
"""Tokens of a program that takes a part of a row."""
CHUNK_WARPS = 8
BLOCK = 1024
"""Tokens looked at together by a program that takes a whole row."""
LOGPROB_BLOCK = 4096
LOGPROB_WARPS = 4

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)


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
def _distances(row, start, size, peak, temperature, BLOCK: tl.constexpr):
    """How far some tokens' scores lie below the highest; infinite past the end."""
    token = start + tl.arange(0, BLOCK)
    logits = tl.load(row + token, mask=token < size, other=float("-inf")).to(tl.float32)
    return tl.div_rn(peak - logits, temperature)


@triton.jit
def _weights(distance, min_p):
    weights = tl.exp(-distance)
    return tl.where(weights >= min_p, weights, 0.0)


@triton.jit
def _nearest(chunk_peaks, start, peak, temperature, CHUNK: tl.constexpr):
    """The bits of the least distance in a chunk, by which most chunks can be passed over."""
    return tl.div_rn(peak - tl.load(chunk_peaks + start // CHUNK), temperature).to(tl.int32, bitcast=True)


@triton.jit
def _find(
    row,
    chunk_peaks,
    size,
    peak,
    temperature,
    min_p,
    target,
    BY_COUNT: tl.constexpr,
    EXCEED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The bits of the distance at which the ranking's weight (or count) reaches the target, or exceeds it, and the
    weight (or count) of all that are closer."""
    place = tl.arange(0, 16)
    bits = tl.zeros([], tl.int32)
    below = tl.zeros([], tl.float64)
    for step in range(8):
        shift = 28 - 4 * step
        sums = tl.zeros([16], tl.float64)
        for start in range(0, size, BLOCK):
            nearest = _nearest(chunk_peaks, start, peak, temperature, CHUNK)
            if (nearest >> shift) - (bits >> shift) < 16:
                distance = _distances(row, start, size, peak, temperature, BLOCK)
                if BY_COUNT:
                    exists = start + tl.arange(0, BLOCK) < size
                    weights = tl.where(exists, 1.0, 0.0)
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
def _weight_closer_than(
    row, chunk_peaks, size, peak, temperature, min_p, bits, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    total = tl.zeros([], tl.float64)
    for start in range(0, size, BLOCK):
        if _nearest(chunk_peaks, start, peak, temperature, CHUNK) < bits:
            distance = _distances(row, start, size, peak, temperature, BLOCK)
            weights = tl.where(distance.to(tl.int32, bitcast=True) < bits, _weights(distance, min_p), 0.0)
            total += tl.sum(weights, 0).to(tl.float64)
    return total


@triton.jit
def _nth_at(row, chunk_peaks, size, peak, temperature, bits, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The id of the token number n, from 0, of those at one distance; of the last if there are fewer."""
    found = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int32)
    for start in range(0, size, BLOCK):
        if _nearest(chunk_peaks, start, peak, temperature, CHUNK) <= bits:
            distance = _distances(row, start, size, peak, temperature, BLOCK)
            token = start + tl.arange(0, BLOCK)
            equal = ((distance.to(tl.int32, bitcast=True) == bits) & (token < size)).to(tl.int32)
            number = before + tl.cumsum(equal, 0) - 1
            found = tl.maximum(found, tl.max(tl.where((equal > 0) & (number <= n), token, 0), 0))
            before += tl.sum(equal, 0)
    return found


@triton.jit
def _draw_by_id(row, start, end, size, peak, temperature, min_p, target, BLOCK: tl.constexpr):
    """The first token from `start` on at which the weight of all up to it exceeds the target; the last with any weight
    before `end` if none does."""
    found = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.float64)
    for begin in range(start, end, BLOCK):
        weights = _weights(_distances(row, begin, size, peak, temperature, BLOCK), min_p).to(tl.float64)
        reached = before + tl.cumsum(weights, 0)
        token = begin + tl.arange(0, BLOCK)
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
    min_ps,
    chunk_weights,
    stride,
    size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The weight of a chunk, of rows that draw."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + index)
    _, peak = _peaks_of_row(chunk_peaks, index, num_chunks, CHUNKS)
    if (temperature == 0) | ((peak - peak) != 0):
        return
    row = logits + index.to(tl.int64) * stride
    weights = _weights(_distances(row, chunk * CHUNK, size, peak, temperature, CHUNK), tl.load(min_ps + index))
    tl.store(chunk_weights + index * num_chunks + chunk, tl.sum(weights.to(tl.float64), 0))


@triton.jit
def sample_kernel(
    logits,
    chunk_peaks,
    chunk_ids,
    chunk_weights,
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
    own = chunk_peaks + index * num_chunks

    filters_k = (top_k > 0) & (top_k < size)
    if filters_k:
        bits, closer = _find(row, own, size, peak, temperature, 0.0, top_k.to(tl.float64), True, False, BLOCK, CHUNK)
        distance = bits.to(tl.float32, bitcast=True)
        kept = _weight_closer_than(row, own, size, peak, temperature, min_p, bits, BLOCK, CHUNK)
        kept += (top_k.to(tl.float64) - closer) * _weights(distance, min_p).to(tl.float64)
    else:
        kept = tl.sum(sums, 0)
    if top_p < 1:
        needed = top_p * kept
        bits, closer = _find(row, own, size, peak, temperature, min_p, needed, False, False, BLOCK, CHUNK)
        weight = _weights(bits.to(tl.float32, bitcast=True), min_p).to(tl.float64)
        at_edge = tl.maximum(tl.ceil((needed - closer) / weight), 1.0)
        kept = tl.minimum(kept, closer + at_edge * weight)
    target = uniform * kept
    if filters_k | (top_p < 1):
        bits, closer = _find(row, own, size, peak, temperature, min_p, target, False, True, BLOCK, CHUNK)
        weight = _weights(bits.to(tl.float32, bitcast=True), min_p).to(tl.float64)
        number = tl.floor(tl.maximum(target - closer, 0.0) / weight).to(tl.int32)
        tl.store(tokens + index, _nth_at(row, own, size, peak, temperature, bits, number, BLOCK, CHUNK))
    else:
        # Rounding may leave the target beyond everything: then the last chunk that holds anything is meant.
        last = tl.max(tl.where(sums > 0, chunk, 0), 0)
        chosen = tl.minimum(tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32), 0), last)
        before = tl.sum(tl.where(chunk < chosen, sums, 0.0), 0)
        start = chosen * CHUNK
        token = _draw_by_id(row, start, start + CHUNK, size, peak, temperature, min_p, target - before, BLOCK)
        tl.store(tokens + index, token)


@triton.jit
def chosen_logprobs_kernel(logits, tokens, logprobs, ranks, stride, size, BLOCK: tl.constexpr):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    chosen = tl.load(tokens + index)
    own = tl.load(row + chosen).to(tl.float32)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float64)
    before = tl.zeros([], tl.int32)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        values = tl.load(row + token, mask=token < size, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(values, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - shift).to(tl.float64) + tl.sum(tl.exp(values - shift), 0).to(tl.float64)
        peak = new_peak
        ahead = (values > own) | ((values == own) & (token < chosen))
        before += tl.sum(ahead.to(tl.int32), 0)
    tl.store(logprobs + index, (own - peak).to(tl.float64) - tl.log(total))
    tl.store(ranks + index, before + 1)


def row_warps(architecture: int) -> int:
    """Of a program that takes a whole row; where a Blackwell GPU gives eight of them too few registers, four."""
    return 8 if architecture < 100 else 4


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
    shape = (logits.stride(0), size, num_chunks)
    chunks = triton.next_power_of_2(num_chunks)
    peaks_kernel[(num_rows, num_chunks)](logits, chunk_peaks, chunk_ids, *shape, CHUNK=CHUNK, num_warps=CHUNK_WARPS)
    weights_kernel[(num_rows, num_chunks)](
        logits,
        chunk_peaks,
        rows.temperature,
        rows.min_p,
        chunk_weights,
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
        num_warps=row_warps(architecture_of(logits.device)),
    )
    return tokens, peaks


def chosen_logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """logits [R, vocabulary], tokens [R] int32 -> their log-probabilities [R] float64 and ranks from 1 [R] int32.

    No more of the distribution is written than these.
    """
    num_rows, size = logits.shape
    logprobs = torch.empty(num_rows, dtype=torch.float64, device=logits.device)
    ranks = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        chosen_logprobs_kernel[(num_rows,)](
            logits, tokens, logprobs, ranks, logits.stride(0), size, BLOCK=LOGPROB_BLOCK, num_warps=LOGPROB_WARPS
        )
    return logprobs, ranks
