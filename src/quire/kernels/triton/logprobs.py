"""Log-probabilities and ranks of sampled tokens, and the most likely tokens of each row, without the host.

Rows are processed in chunks, one program each: every chunk has its sum and its most likely tokens. Then one program per
row merges them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.triton.configs import CHUNK, CHUNK_WARPS, ROW_WARPS

_NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def _rank_keys(values, token, exists):
    """Distinct integers in the order of the ranking: by value, and by the lower id among equals."""
    values = tl.where(values == 0, 0.0, values)  # -0.0 becomes 0.0
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
    """For rows that ask for log-probabilities: a chunk's peak, its sum of exp(logit - peak), the number of its tokens
    that rank before the sampled one, and its most likely tokens."""
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
    """A row's report, from those of its chunks."""
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


def report(logits: Tensor, tokens: Tensor, nums_reported: Tensor, max_reported: int) -> Tensor:
    """logits [R, vocabulary], tokens [R] int32, nums_reported [R] int32 -> [2 + 2 max_reported, R] int32. A column
    holds the rank of the row's token, from 1; the bits of its log-probability as float32; the ids of the most likely
    tokens; and the bits of their log-probabilities.

    `nums_reported` counts the tokens of a row's report, the sampled one included; 0: no report, the column is void.
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
