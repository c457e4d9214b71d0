"""DeviceSampler: draws tokens where the logits are, without waiting for them, and tells their log-probabilities; for
rows that ask for nothing else.

The rules are those of `quire.sampling.draws` and `logprobs`: the same numbers drawn, the same order among equals, sums
in float64 over float32 blocks. So a row gets the token that the sampler on the host would give it, but where rounding
puts a target on the other side of a token's edge, and the same report but for rounding. Where the backend has kernels
for it they draw; else torch does, which sorts filtered rows.

What rows ask for goes to the device as columns, beside a step's other inputs. The columns of the kernels have one entry
a row and fixed types, so a captured step reads them from memory that stays.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.sampling.sampler import NO_TOKEN, SampleResult, explain_max_logit
from quire.sampling.state import Draw, SamplingState
from quire.sampling.uniforms import stream_keys, uniforms
from quire.step import TokenLogprobs

BLOCK_SIZE = 256
"""As in `draws`."""
MAX_SORTED_ELEMENTS = 2**22
"""Scores that are sorted at once, with their ids, weights and sums: about 120 MB."""
MAX_RANKED_ELEMENTS = 2**20
"""Scores whose ranks are found at once by torch: about 30 MB, within any budget for log-probabilities."""
MAX_REPORTED = 20
"""Most likely tokens that a device tells of a row: what the server's clients may ask for at most if not told otherwise.
Who asks for more, or for the distribution after filters, gets it from the host."""
KERNEL_COLUMNS: Mapping[str, np.generic] = MappingProxyType(
    {
        "temperature": np.float32(0.0),
        "top_k": np.int32(0),
        "top_p": np.float64(1.0),
        "min_p": np.float32(0.0),
        "keys": np.int64(0),
        "positions": np.int64(0),
        "nums_reported": np.int32(0),
    }
)
"""What kernels are told of each row, and the entries of a row that takes the most likely token."""


_LAST_ID = 2**31 - 1
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "keys", "positions")
_ASKED = ("temperature", "top_k", "top_p", "min_p", "uniform")


def draws_only(state: SamplingState) -> bool:
    """Whether a token can be drawn from the model's logits as they are, and no more is told of it than theirs say."""
    params = state.params
    return not (
        state.draw is Draw.BEAM
        or (params.logprobs is not None and not reports_on_device(params.logprobs))
        or (params.logprobs is not None and params.logprobs_mode != "raw_logprobs")
        or params.logits_processors
        or state.grammar is not None
        or state.allowed_ids is not None
        or state.bias_by_id
        or state.bad_words is not None
        or state.token_counts is not None
        or state.position < params.min_tokens
    )


def reports_on_device(num_logprobs: int) -> bool:
    """Whether so many most likely tokens can be told of a row there; -1: all."""
    return 0 <= num_logprobs <= MAX_REPORTED


class SamplingKernels(Protocol):
    """A module that draws without sorting."""

    def SamplingRows(
        self, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, positions: Tensor
    ) -> Any:
        """What R rows ask for, [R] each: temperature float32 (0: the most likely token), top_k int32 (0: all), top_p
        float64, min_p float32, and as int64 the bits of `uniforms.stream_keys` and the positions to be drawn."""
        ...

    def sample(self, logits: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        """logits [R, vocabulary] -> tokens [R] int32, and the highest logit of each row [R] float32."""
        ...

    def report(self, logits: Tensor, tokens: Tensor, nums_reported: Tensor, max_reported: int) -> Tensor:
        """logits [R, vocabulary], tokens [R] int32, nums_reported [R] int32 -> int32 [2 + 2 max_reported, R]: the rank
        of each row's token and the bits of its log-probability as float32; the most likely tokens, and the bits of
        theirs. Of a row for which nums_reported is less than 1 + max_reported the last are void."""
        ...


class DeviceSampler:
    """Draws for one batch after the other; what does not change between the steps of a batch is gathered once."""

    def __init__(self, vocab_size: int, kernels: SamplingKernels | None = None) -> None:
        self._vocab_size = vocab_size
        self._kernels = kernels
        self._states: list[SamplingState] = []
        self._columns: dict[str, NDArray[Any]] = {}
        self._stream_keys: NDArray[np.uint64] = stream_keys([], [])

    def columns(self, states: Sequence[SamplingState]) -> dict[str, NDArray[Any]]:
        """What `draw` has to know of R rows, on the host: with kernels KERNEL_COLUMNS, [R] each."""
        if self._states != list(states):
            self._states = list(states)
            self._stream_keys = stream_keys([state.seed for state in states], [state.sample_index for state in states])
            self._columns = self._gather(states)
        positions = np.array([state.position for state in states], dtype=np.int64)
        if self._kernels is not None:
            return {**self._columns, "positions": positions}
        return {**self._columns, "uniform": uniforms(self._stream_keys, positions.astype(np.uint64))}

    def _gather(self, states: Sequence[SamplingState]) -> dict[str, NDArray[Any]]:
        params = [state.params for state in states]
        draws = [state.draw for state in states]
        columns: dict[str, NDArray[Any]] = {
            "temperature": np.array([0.0 if p.greedy else p.temperature for p in params], dtype=np.float32),
            "top_k": np.array(
                [p.top_k if draw is Draw.TOP_K else self._vocab_size for p, draw in zip(params, draws, strict=True)],
                dtype=np.int32,
            ),
            "top_p": np.array([p.top_p for p in params], dtype=np.float64),
            "min_p": np.array([p.min_p for p in params], dtype=np.float32),
            "nums_reported": np.array([0 if p.logprobs is None else 1 + p.logprobs for p in params], dtype=np.int32),
        }
        if self._kernels is not None:
            return {**columns, "keys": self._stream_keys.view(np.int64)}
        return {
            **columns,
            "unfiltered": np.flatnonzero([draw is Draw.UNFILTERED for draw in draws]),
            "filtered": np.flatnonzero([draw in (Draw.TOP_K, Draw.TOP_P) for draw in draws]),
        }

    def draw(self, logits: Tensor, columns: Mapping[str, Tensor], *, reports: bool) -> Tensor:
        """logits [R, vocabulary], `columns` on the device -> int32 [2, R]: tokens, and the bits of each row's peak as
        float32. With `reports` the rows of `report` are below these.

        The peak is the highest logit; a row whose highest logit is not finite has some token, which is void.
        """
        if self._kernels is not None:
            rows = self._kernels.SamplingRows(**{name: columns[name] for name in _DRAWING})
            tokens, peaks = self._kernels.sample(logits, rows)
        else:
            tokens, peaks = _draw(logits, columns)
        drawn = torch.stack((tokens.int(), peaks.view(torch.int32)))
        return torch.cat((drawn, self.report(logits, drawn[0], columns["nums_reported"]))) if reports else drawn

    def report(self, logits: Tensor, tokens: Tensor, nums_reported: Tensor) -> Tensor:
        """As `SamplingKernels.report`, of MAX_REPORTED tokens or all there are: what `read_reports` reads."""
        max_reported = min(MAX_REPORTED, self._vocab_size)
        if self._kernels is not None:
            return self._kernels.report(logits, tokens, nums_reported, max_reported)
        num_rows = max(1, MAX_RANKED_ELEMENTS // self._vocab_size)
        parts = zip(logits.split(num_rows), tokens.split(num_rows), strict=True)
        return torch.cat([_report(*part, max_reported) for part in parts], dim=1)


def read_draws(drawn: NDArray[np.int32], states: Sequence[SamplingState]) -> SampleResult:
    """What `DeviceSampler.draw` gave, on the host; behind the rows of `states` may be others."""
    drawn = drawn[:, : len(states)]
    tokens, bits = drawn[:2]
    peaks = bits.view(np.float32)
    sound = np.isfinite(peaks)
    errors: list[str | None] = [None] * len(states)
    for index in np.flatnonzero(~sound).tolist():
        errors[index] = explain_max_logit(float(peaks[index]))
    token_ids = np.where(sound, tokens, NO_TOKEN).tolist()
    logprobs: list[TokenLogprobs | None] = [None] * len(states)
    if len(drawn) > 2:
        asking = [index for index in np.flatnonzero(sound).tolist() if states[index].params.logprobs is not None]
        nums_logprobs = [states[index].params.logprobs or 0 for index in asking]
        told = read_reports(drawn[2:, asking], [token_ids[index] for index in asking], nums_logprobs)
        for index, each in zip(asking, told, strict=True):
            logprobs[index] = each
    return SampleResult(token_ids, logprobs, errors, {})


def read_reports(
    reports: NDArray[np.int32], token_ids: Sequence[int], nums_logprobs: Sequence[int]
) -> list[TokenLogprobs]:
    """What `DeviceSampler.report` gave of some rows, on the host: of each its token and that many most likely ones."""
    max_reported = len(reports) // 2 - 1
    ranks, own = reports[0].tolist(), reports[1].view(np.float32).tolist()
    ids = reports[2 : 2 + max_reported].T.tolist()
    logprobs = np.ascontiguousarray(reports[2 + max_reported :].T).view(np.float32).tolist()
    found = []
    for row, (token_id, wanted) in enumerate(zip(token_ids, nums_logprobs, strict=True)):
        k = min(wanted, max_reported)
        found.append(
            TokenLogprobs([token_id, *ids[row][:k]], [own[row], *logprobs[row][:k]], [ranks[row], *range(1, k + 1)])
        )
    return found


def _report(logits: Tensor, tokens: Tensor, max_reported: int) -> Tensor:
    scores = logits.float()
    scores = scores.masked_fill(scores == 0, 0.0)  # of which there are two
    # Whole numbers that are ordered as the ranking is: by score, and by the lower id among equals. All differ.
    ordered = scores.view(torch.int32)
    ordered = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    place = torch.arange(scores.shape[1], device=scores.device)
    keys = (ordered.long() << 32) + (_LAST_ID - place)
    own = tokens.long()[:, None]
    rank = 1 + (keys > keys.gather(1, own)).sum(1, keepdim=True)
    ids = _LAST_ID - (keys.topk(max_reported).values & _LAST_ID)
    peaks = scores.amax(1, keepdim=True)
    weights = torch.nn.functional.pad((scores - peaks).exp_(), (0, -scores.shape[1] % BLOCK_SIZE))
    total = weights.unflatten(1, (-1, BLOCK_SIZE)).sum(-1).double().sum(1, keepdim=True)
    chosen = torch.cat((own, ids), 1)
    logprobs = (scores.gather(1, chosen).double() - peaks - total.log()).float().view(torch.int32)
    return torch.cat((rank.int(), logprobs[:, :1], ids.int(), logprobs[:, 1:]), 1).T


def _draw(logits: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    peaks, tokens = logits.max(dim=-1)  # the lowest id among equals; NaN counts as highest
    peaks = peaks.float()
    for group, how in (("unfiltered", _draw_unfiltered), ("filtered", _draw_filtered)):
        for rows in columns[group].split(max(1, MAX_SORTED_ELEMENTS // logits.shape[1])):
            if len(rows):
                asked = {name: columns[name][rows, None] for name in _ASKED}
                # A row of no finite peak becomes NaN, which no comparison is true of: it draws some valid id.
                scores = (logits[rows].float() - peaks[rows, None]) / asked["temperature"]
                tokens[rows] = how(scores, asked)
    return tokens, peaks


def _draw_unfiltered(scores: Tensor, asked: Mapping[str, Tensor]) -> Tensor:
    weights = _likely(scores.exp_(), asked)
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK_SIZE)).unflatten(1, (-1, BLOCK_SIZE))
    cumulative = blocks.sum(-1).double().cumsum(1)
    target = _target(asked["uniform"], cumulative[:, -1:])
    block = _first_above(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK_SIZE)).squeeze(1).double().cumsum(1)
    target = torch.minimum(target - before, _below(inside[:, -1:]))
    return (block * BLOCK_SIZE + _first_above(inside, target)).squeeze(1).clamp(max=scores.shape[1] - 1)


def _draw_filtered(scores: Tensor, asked: Mapping[str, Tensor]) -> Tensor:
    scores, ids = scores.sort(dim=1, descending=True, stable=True)  # the lowest id first among equals
    weights = _likely(scores.exp_(), asked)
    place = torch.arange(weights.shape[1], device=weights.device)
    cumulative = weights.masked_fill_(place >= asked["top_k"], 0.0).double().cumsum(1)
    needed = asked["top_p"] * cumulative[:, -1:]
    last = (cumulative < needed).sum(1, keepdim=True).clamp(max=weights.shape[1] - 1)
    target = _target(asked["uniform"], cumulative.gather(1, last))
    return ids.gather(1, _first_above(cumulative, target).clamp(max=weights.shape[1] - 1)).squeeze(1)


def _likely(weights: Tensor, asked: Mapping[str, Tensor]) -> Tensor:
    return weights.mul_(weights >= asked["min_p"])


def _target(uniform: Tensor, mass: Tensor) -> Tensor:
    """Points in [0, mass): the product alone may round up to the mass itself."""
    return torch.minimum(uniform * mass, _below(mass))


def _below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    return (cumulative <= target).sum(1, keepdim=True)
