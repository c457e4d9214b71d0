"""DeviceSampler: samples tokens where the logits are, without waiting for them. It serves rows that need no edits of
their logits, and computes their log-probabilities too.

The rules are those of the host's kernels (`sample_tokens`) and of `logprobs`: the same random numbers, the same order
among equals, sums in float64 over float32 blocks. So a row gets the token that the host would sample, unless rounding
moves a random number across the edge of a token, and the same log-probabilities but for rounding. A backend's own
kernels do the work where it has them; otherwise torch does, which sorts the rows that have filters.

The rows' parameters go to the device as columns, beside the step's other inputs. The columns of the kernels have one
entry per row and fixed types, so a captured step reads them from fixed memory.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.sampling.sampler import NO_TOKEN, SampleResult, explain_max_logit
from quire.sampling.state import SamplingMode, SamplingState
from quire.sampling.uniforms import stream_keys, uniforms
from quire.step import TokenLogprobs

BLOCK_SIZE = 256
"""Tokens whose weights are summed in float32, as in csrc/draw.h."""
MAX_SORTED_ELEMENTS = 2**22
"""Scores that are sorted at once, with their ids, weights and sums: about 120 MB."""
MAX_RANKED_ELEMENTS = 2**20
"""Scores that torch ranks at once: about 30 MB, within any budget for log-probabilities."""
MAX_DEVICE_LOGPROBS = 20
"""Most likely tokens per row that the device can give log-probabilities of: the default limit of the server's clients.
Rows that ask for more, or for processed log-probabilities, are sampled on the host."""
KERNEL_COLUMNS: Mapping[str, np.generic] = MappingProxyType(
    {
        "temperature": np.float32(0.0),
        "top_k": np.int32(0),
        "top_p": np.float64(1.0),
        "min_p": np.float32(0.0),
        "keys": np.int64(0),
        "positions": np.int64(0),
        "num_entries": np.int32(0),
    }
)
"""The kernels' parameters of each row, with the values of a row that takes the most likely token."""


_LAST_ID = 2**31 - 1
_SAMPLING_COLUMNS = ("temperature", "top_k", "top_p", "min_p", "keys", "positions")
_TORCH_COLUMNS = ("temperature", "top_k", "top_p", "min_p", "uniform")


def can_sample_on_device(state: SamplingState) -> bool:
    """True if the next token is sampled from the model's logits as they are, and the device can compute the
    log-probabilities that are asked for."""
    params = state.params
    return not (
        state.mode is SamplingMode.BEAM
        or (params.logprobs is not None and not has_device_logprobs(params.logprobs))
        or (params.logprobs is not None and params.logprobs_mode != "raw_logprobs")
        or params.logits_processors
        or state.grammar is not None
        or state.allowed_ids is not None
        or state.bias_by_id
        or state.bad_words is not None
        or state.token_counts is not None
        or state.position < params.min_tokens
    )


def has_device_logprobs(num_logprobs: int) -> bool:
    """True if the device can give that many log-probabilities per row. It cannot give -1, the whole vocabulary."""
    return 0 <= num_logprobs <= MAX_DEVICE_LOGPROBS


class SamplingKernels(Protocol):
    """A module that samples without sorting."""

    def SamplingRows(
        self, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, positions: Tensor
    ) -> Any:
        """The parameters of R rows, [R] each: temperature float32 (0: the most likely token), top_k int32 (0: all),
        top_p float64, min_p float32, and as int64 the bits of `uniforms.stream_keys` and the positions to sample."""
        ...

    def sample(self, logits: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        """logits [R, vocabulary] -> tokens [R] int32, and the highest logit of each row [R] float32."""
        ...

    def report(self, logits: Tensor, tokens: Tensor, num_entries: Tensor, max_logprobs: int) -> Tensor:
        """logits [R, vocabulary], tokens [R] int32, num_entries [R] int32 -> int32 [2 + 2 max_logprobs, R].

        Rows of the result: the rank of each row's token; the bits of its log-probability as float32; the most likely
        tokens; the bits of their log-probabilities. If `num_entries`, which counts the row's own token, is less than
        1 + max_logprobs, the last of the most likely tokens mean nothing."""
        ...


class DeviceSampler:
    """Samples one batch after the other. The columns of a batch that returns are built once."""

    def __init__(self, vocab_size: int, kernels: SamplingKernels | None = None) -> None:
        self._vocab_size = vocab_size
        self._kernels = kernels
        self._states_id = 0
        self._columns: dict[str, NDArray[Any]] = {}
        self._stream_keys: NDArray[np.uint64] = stream_keys([], [])

    def columns(self, states: Sequence[SamplingState], states_id: int = 0) -> dict[str, NDArray[Any]]:
        """The parameters of R rows for `sample`, on the host. With kernels these are KERNEL_COLUMNS, [R] each.

        A non-zero `states_id` stands for these states in this order: the next call with the same id only reads their
        positions.
        """
        if not states_id or states_id != self._states_id:
            self._stream_keys = stream_keys([state.seed for state in states], [state.sample_index for state in states])
            self._columns = self._build_columns(states)
            self._states_id = states_id
        positions = np.array([state.position for state in states], dtype=np.int64)
        if self._kernels is not None:
            return {**self._columns, "positions": positions}
        return {**self._columns, "uniform": uniforms(self._stream_keys, positions.astype(np.uint64))}

    def _build_columns(self, states: Sequence[SamplingState]) -> dict[str, NDArray[Any]]:
        params = [state.params for state in states]
        modes = [state.mode for state in states]
        top_k = [
            p.top_k if mode is SamplingMode.TOP_K else self._vocab_size for p, mode in zip(params, modes, strict=True)
        ]
        columns: dict[str, NDArray[Any]] = {
            "temperature": np.array([0.0 if p.greedy else p.temperature for p in params], dtype=np.float32),
            "top_k": np.array(top_k, dtype=np.int32),
            "top_p": np.array([p.top_p for p in params], dtype=np.float64),
            "min_p": np.array([p.min_p for p in params], dtype=np.float32),
            "num_entries": np.array([0 if p.logprobs is None else 1 + p.logprobs for p in params], dtype=np.int32),
        }
        if self._kernels is not None:
            return {**columns, "keys": self._stream_keys.view(np.int64)}
        return {
            **columns,
            "unfiltered": np.flatnonzero([mode is SamplingMode.UNFILTERED for mode in modes]),
            "filtered": np.flatnonzero([mode in (SamplingMode.TOP_K, SamplingMode.TOP_P) for mode in modes]),
        }

    def sample(self, logits: Tensor, columns: Mapping[str, Tensor], *, with_logprobs: bool) -> Tensor:
        """logits [R, vocabulary], `columns` on the device -> int32 [2, R]: tokens, and the bits of each row's highest
        logit as float32. `with_logprobs` the rows of `logprobs` follow below.

        The token of a row whose highest logit is not finite is valid but means nothing.
        """
        if self._kernels is not None:
            rows = self._kernels.SamplingRows(**{name: columns[name] for name in _SAMPLING_COLUMNS})
            tokens, max_logits = self._kernels.sample(logits, rows)
        else:
            tokens, max_logits = _sample(logits, columns)
        samples = torch.stack((tokens.int(), max_logits.view(torch.int32)))
        if not with_logprobs:
            return samples
        return torch.cat((samples, self.logprobs(logits, samples[0], columns["num_entries"])))

    def logprobs(self, logits: Tensor, tokens: Tensor, num_entries: Tensor) -> Tensor:
        """As `SamplingKernels.report`, with MAX_DEVICE_LOGPROBS tokens or the vocabulary; `read_logprobs` reads it."""
        max_logprobs = min(MAX_DEVICE_LOGPROBS, self._vocab_size)
        if self._kernels is not None:
            return self._kernels.report(logits, tokens, num_entries, max_logprobs)
        num_rows = max(1, MAX_RANKED_ELEMENTS // self._vocab_size)
        parts = zip(logits.split(num_rows), tokens.split(num_rows), strict=True)
        return torch.cat([_logprobs(*part, max_logprobs) for part in parts], dim=1)


def read_samples(samples: NDArray[np.int32], states: Sequence[SamplingState]) -> SampleResult:
    """The result of `DeviceSampler.sample`, on the host. Columns after those of `states` are padding."""
    samples = samples[:, : len(states)]
    tokens, bits = samples[:2]
    max_logits = bits.view(np.float32)
    is_finite = np.isfinite(max_logits)
    errors: list[str | None] = [None] * len(states)
    for index in np.flatnonzero(~is_finite).tolist():
        errors[index] = explain_max_logit(float(max_logits[index]), states[index].params)
    token_ids = np.where(is_finite, tokens, NO_TOKEN).tolist()
    logprobs: list[TokenLogprobs | None] = [None] * len(states)
    if len(samples) > 2:
        wanting = [index for index in np.flatnonzero(is_finite).tolist() if states[index].params.logprobs is not None]
        nums_logprobs = [states[index].params.logprobs or 0 for index in wanting]
        found = read_logprobs(samples[2:, wanting], [token_ids[index] for index in wanting], nums_logprobs)
        for index, each in zip(wanting, found, strict=True):
            logprobs[index] = each
    return SampleResult(token_ids, logprobs, errors, {})


def read_logprobs(
    logprobs: NDArray[np.int32], token_ids: Sequence[int], nums_logprobs: Sequence[int]
) -> list[TokenLogprobs]:
    """The result of `DeviceSampler.logprobs`, on the host: each row's own token and its most likely ones."""
    max_logprobs = len(logprobs) // 2 - 1
    ranks, own = logprobs[0].tolist(), logprobs[1].view(np.float32).tolist()
    ids = logprobs[2 : 2 + max_logprobs].T.tolist()
    top = np.ascontiguousarray(logprobs[2 + max_logprobs :].T).view(np.float32).tolist()
    found = []
    for row, (token_id, num_logprobs) in enumerate(zip(token_ids, nums_logprobs, strict=True)):
        k = min(num_logprobs, max_logprobs)
        found.append(
            TokenLogprobs([token_id, *ids[row][:k]], [own[row], *top[row][:k]], [ranks[row], *range(1, k + 1)])
        )
    return found


def _logprobs(logits: Tensor, tokens: Tensor, max_logprobs: int) -> Tensor:
    scores = logits.float()
    scores = scores.masked_fill(scores == 0, 0.0)  # -0.0 equals 0.0
    # Distinct whole numbers in the order of the ranking: by score, then by the lower id among equals.
    ordered = scores.view(torch.int32)
    ordered = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    place = torch.arange(scores.shape[1], device=scores.device)
    keys = (ordered.long() << 32) + (_LAST_ID - place)
    own = tokens.long()[:, None]
    rank = 1 + (keys > keys.gather(1, own)).sum(1, keepdim=True)
    ids = _LAST_ID - (keys.topk(max_logprobs).values & _LAST_ID)
    max_logits = scores.amax(1, keepdim=True)
    weights = torch.nn.functional.pad((scores - max_logits).exp_(), (0, -scores.shape[1] % BLOCK_SIZE))
    total = weights.unflatten(1, (-1, BLOCK_SIZE)).sum(-1).double().sum(1, keepdim=True)
    chosen = torch.cat((own, ids), 1)
    logprobs = (scores.gather(1, chosen).double() - max_logits - total.log()).float().view(torch.int32)
    return torch.cat((rank.int(), logprobs[:, :1], ids.int(), logprobs[:, 1:]), 1).T


def _sample(logits: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    max_logits, tokens = logits.max(dim=-1)  # the lowest id among equals; NaN counts as highest
    max_logits = max_logits.float()
    for group, how in (("unfiltered", _sample_unfiltered), ("filtered", _sample_filtered)):
        for rows in columns[group].split(max(1, MAX_SORTED_ELEMENTS // logits.shape[1])):
            if len(rows):
                params = {name: columns[name][rows, None] for name in _TORCH_COLUMNS}
                # A row without a finite highest logit becomes NaN. No comparison with NaN is true, so its id is valid.
                scores = (logits[rows].float() - max_logits[rows, None]) / params["temperature"]
                tokens[rows] = how(scores, params)
    return tokens, max_logits


def _sample_unfiltered(scores: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    weights = _apply_min_p(scores.exp_(), params)
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK_SIZE)).unflatten(1, (-1, BLOCK_SIZE))
    cumulative = blocks.sum(-1).double().cumsum(1)
    target = _target(params["uniform"], cumulative[:, -1:])
    block = _first_above(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK_SIZE)).squeeze(1).double().cumsum(1)
    target = torch.minimum(target - before, _below(inside[:, -1:]))
    return (block * BLOCK_SIZE + _first_above(inside, target)).squeeze(1).clamp(max=scores.shape[1] - 1)


def _sample_filtered(scores: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    scores, ids = scores.sort(dim=1, descending=True, stable=True)  # the lowest id first among equals
    weights = _apply_min_p(scores.exp_(), params)
    place = torch.arange(weights.shape[1], device=weights.device)
    cumulative = weights.masked_fill_(place >= params["top_k"], 0.0).double().cumsum(1)
    needed = params["top_p"] * cumulative[:, -1:]
    last = (cumulative < needed).sum(1, keepdim=True).clamp(max=weights.shape[1] - 1)
    target = _target(params["uniform"], cumulative.gather(1, last))
    return ids.gather(1, _first_above(cumulative, target).clamp(max=weights.shape[1] - 1)).squeeze(1)


def _apply_min_p(weights: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    return weights.mul_(weights >= params["min_p"])


def _target(uniform: Tensor, mass: Tensor) -> Tensor:
    """Points in [0, mass): the product alone may round up to the mass itself."""
    return torch.minimum(uniform * mass, _below(mass))


def _below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    return (cumulative <= target).sum(1, keepdim=True)
