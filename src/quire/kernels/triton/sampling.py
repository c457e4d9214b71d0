"""Sampling without sorting: one token per row of logits, and its log-probability, without the host.

A row draws the token that `quire.sampling` draws for it on a CPU: the same uniform number (`quire.sampling.uniforms`),
laid over the same tokens in the same order. Without a filter that is the order of ids; with one it is that of the
ranking, highest first and lowest id first among equals, of which top-k, top-p and min-p each keep a head. What the two
devices compute differs by rounding alone, so they differ in a token only where the number falls on a boundary.

A rank is found by the bits of the score: with d = (peak - logit) / temperature, which is never negative, the bits of d
ordered as a whole number are ordered as d is. Eight passes over the row find them four at a time, each summing the
weights exp(-d) of the tokens in sixteen ranges. Sums are float64 over short float32 parts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Tokens looked at together."""
NUM_WARPS = 4
LOGPROB_BLOCK = 4096

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
def _find(
    row, size, peak, temperature, min_p, target, BY_COUNT: tl.constexpr, EXCEED: tl.constexpr, BLOCK: tl.constexpr
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
def _weight_closer_than(row, size, peak, temperature, min_p, bits, BLOCK: tl.constexpr):
    total = tl.zeros([], tl.float64)
    for start in range(0, size, BLOCK):
        distance = _distances(row, start, size, peak, temperature, BLOCK)
        weights = tl.where(distance.to(tl.int32, bitcast=True) < bits, _weights(distance, min_p), 0.0)
        total += tl.sum(weights, 0).to(tl.float64)
    return total


@triton.jit
def _nth_at(row, size, peak, temperature, bits, n, BLOCK: tl.constexpr):
    """The id of the token number n, from 0, of those at one distance; of the last if there are fewer."""
    found = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int32)
    for start in range(0, size, BLOCK):
        distance = _distances(row, start, size, peak, temperature, BLOCK)
        token = start + tl.arange(0, BLOCK)
        equal = ((distance.to(tl.int32, bitcast=True) == bits) & (token < size)).to(tl.int32)
        number = before + tl.cumsum(equal, 0) - 1
        found = tl.maximum(found, tl.max(tl.where((equal > 0) & (number <= n), token, 0), 0))
        before += tl.sum(equal, 0)
    return found


@triton.jit
def _draw_by_id(row, size, peak, temperature, min_p, target, BLOCK: tl.constexpr):
    """The first token at which the weight of all up to it exceeds the target; the last with any if none does."""
    found = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.float64)
    for start in range(0, size, BLOCK):
        weights = _weights(_distances(row, start, size, peak, temperature, BLOCK), min_p).to(tl.float64)
        reached = before + tl.cumsum(weights, 0)
        token = start + tl.arange(0, BLOCK)
        # Tokens are passed as long as the sum before them does not exceed the target; the last of these is drawn.
        candidate = (weights > 0) & (reached - weights <= target)
        found = tl.maximum(found, tl.max(tl.where(candidate, token, 0), 0))
        before += tl.sum(weights, 0)
    return found


@triton.jit
def sample_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, keys, positions, tokens, peaks, stride, size, BLOCK: tl.constexpr
):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    unsound = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        values = tl.load(row + token, mask=token < size, other=float("-inf")).to(tl.float32)
        unsound = unsound | (values != values).to(tl.int32)
        highest = tl.maximum(highest, values)
    peak = tl.max(highest, 0)
    # A maximum may pass over NaN. Such a row, or one without a finite peak, draws nothing.
    peak = tl.where(tl.max(unsound, 0) > 0, float("nan"), peak)
    tl.store(peaks + index, peak)
    tl.store(tokens + index, 0)
    if (peak - peak) != 0:
        return

    temperature = tl.load(temperatures + index)
    if temperature == 0:
        tl.store(tokens + index, _nth_at(row, size, peak, 1.0, 0, 0, BLOCK))
        return
    top_k = tl.load(top_ks + index)
    top_p = tl.load(top_ps + index)
    min_p = tl.load(min_ps + index)
    key = tl.load(keys + index).to(tl.uint64, bitcast=True)
    position = tl.load(positions + index).to(tl.uint64, bitcast=True)
    uniform = (_mix(key + (position + 1) * _GAMMA) >> 11).to(tl.float64) * 1.1102230246251565e-16

    filters_k = (top_k > 0) & (top_k < size)
    if filters_k:
        bits, closer = _find(row, size, peak, temperature, 0.0, top_k.to(tl.float64), True, False, BLOCK)
        distance = bits.to(tl.float32, bitcast=True)
        kept = _weight_closer_than(row, size, peak, temperature, min_p, bits, BLOCK)
        kept += (top_k.to(tl.float64) - closer) * _weights(distance, min_p).to(tl.float64)
    else:
        kept = _weight_closer_than(row, size, peak, temperature, min_p, 0x7F800000, BLOCK)
    if top_p < 1:
        needed = top_p * kept
        bits, closer = _find(row, size, peak, temperature, min_p, needed, False, False, BLOCK)
        weight = _weights(bits.to(tl.float32, bitcast=True), min_p).to(tl.float64)
        at_edge = tl.maximum(tl.ceil((needed - closer) / weight), 1.0)
        kept = tl.minimum(kept, closer + at_edge * weight)
    target = uniform * kept
    if filters_k | (top_p < 1):
        bits, closer = _find(row, size, peak, temperature, min_p, target, False, True, BLOCK)
        weight = _weights(bits.to(tl.float32, bitcast=True), min_p).to(tl.float64)
        number = tl.floor(tl.maximum(target - closer, 0.0) / weight).to(tl.int32)
        tl.store(tokens + index, _nth_at(row, size, peak, temperature, bits, number, BLOCK))
    else:
        tl.store(tokens + index, _draw_by_id(row, size, peak, temperature, min_p, target, BLOCK))


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


def sample(logits: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """logits [R, vocabulary] in any float type, after edits and penalties -> token ids [R] int32, peaks [R] float32.

    A row whose peak is not finite, NaN if it holds any, has no token: its id is 0 and void.
    """
    num_rows, size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    peaks = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        sample_kernel[(num_rows,)](
            logits,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            rows.keys,
            rows.positions,
            tokens,
            peaks,
            logits.stride(0),
            size,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
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
            logits, tokens, logprobs, ranks, logits.stride(0), size, BLOCK=LOGPROB_BLOCK, num_warps=NUM_WARPS
        )
    return logprobs, ranks
