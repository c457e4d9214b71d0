"""DeviceSampler: draws tokens where the logits are, without waiting for them; for rows that ask for nothing else.

The rules are those of `quire.sampling.draws`: the same numbers drawn, the same order among equals, sums in float64 over
float32 blocks. So a row gets the token that the sampler on the host would give it, but where rounding puts a target on
the other side of a token's edge. Where the backend has kernels for it they draw; else torch does, which sorts filtered
rows.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.sampling.state import Draw, SamplingState
from quire.sampling.uniforms import stream_keys, uniforms

BLOCK_SIZE = 256
"""As in `draws`."""
MAX_SORTED_ELEMENTS = 2**22
"""Scores that are sorted at once, with their ids, weights and sums: about 120 MB."""


def draws_only(state: SamplingState) -> bool:
    """Whether a token can be drawn from the model's logits as they are, and nothing else is told of it."""
    params = state.params
    return not (
        state.draw is Draw.BEAM
        or params.logprobs is not None
        or params.logits_processors
        or state.grammar is not None
        or state.allowed_ids is not None
        or state.bias_by_id
        or state.bad_words is not None
        or state.token_counts is not None
        or state.position < params.min_tokens
    )


class SamplingKernels(Protocol):
    """A module that draws without sorting."""

    def SamplingRows(
        self, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, positions: Tensor
    ) -> Any:
        """What R rows ask for, [R] each: temperature float32 (0: the most likely token), top_k int32 (0: all), top_p
        float64, min_p float32, and as int64 the bits of `uniforms.stream_keys` and the positions to be drawn."""
        ...

    def sample(self, logits: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        """logits [R, vocabulary] -> tokens [R], and the highest logit of each row [R] float32."""
        ...


class DeviceSampler:
    """Draws for one batch after the other; what does not change between the steps of a batch stays on the device."""

    def __init__(self, device: torch.device, kernels: SamplingKernels | None = None) -> None:
        self._device = device
        self._kernels = kernels
        self._states: list[SamplingState] = []
        self._batch: _Batch | None = None

    def draw(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """logits [R, vocabulary] -> int32 [2, R] on the device: tokens, and the bits of each row's peak as float32.

        The peak is the highest logit; a row whose highest logit is not finite has some token, which is void.
        """
        if self._batch is None or self._states != list(states):
            self._states = list(states)
            self._batch = _Batch(states, logits.shape[1], self._device)
        if self._kernels is not None:
            return self._batch.draw_with(self._kernels, logits)
        return self._batch.draw(logits)


class _Batch:
    def __init__(self, states: Sequence[SamplingState], vocab_size: int, device: torch.device) -> None:
        self._states = states
        self._device = device
        self._keys = stream_keys([state.seed for state in states], [state.sample_index for state in states])
        draws = [state.draw for state in states]
        self._keys_on_device = to_device(self._keys.view(np.int64), device)
        self._greedy = torch.tensor([draw is Draw.GREEDY for draw in draws], device=device)
        self._all_greedy = all(draw is Draw.GREEDY for draw in draws)
        self._unfiltered = self._indices([draw is Draw.UNFILTERED for draw in draws])
        self._filtered = self._indices([draw in (Draw.TOP_K, Draw.TOP_P) for draw in draws])
        params = [state.params for state in states]
        self._temperature = self._column([1.0 if p.greedy else p.temperature for p in params], torch.float32)
        self._min_p = self._column([p.min_p for p in params], torch.float32)
        self._has_min_p = any(p.min_p > 0 for p in params)
        self._top_p = self._column([p.top_p for p in params], torch.float64)
        self._top_k = self._column(
            [p.top_k if draw is Draw.TOP_K else vocab_size for p, draw in zip(params, draws, strict=True)], torch.int64
        )

    def draw_with(self, kernels: SamplingKernels, logits: Tensor) -> Tensor:
        positions = np.array([state.position for state in self._states], dtype=np.int64)
        tokens, peaks = kernels.sample(
            logits,
            kernels.SamplingRows(
                temperature=self._temperature.flatten().masked_fill(self._greedy, 0.0),
                top_k=self._top_k.flatten().int(),
                top_p=self._top_p.flatten(),
                min_p=self._min_p.flatten(),
                keys=self._keys_on_device,
                positions=to_device(positions, self._device),
            ),
        )
        return torch.stack((tokens.int(), peaks.view(torch.int32)))

    def _indices(self, chosen: list[bool]) -> Tensor | None:
        (indices,) = np.nonzero(np.array(chosen))
        return to_device(indices, self._device) if len(indices) else None

    def _column(self, values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).unsqueeze(1).to(self._device)

    def draw(self, logits: Tensor) -> Tensor:
        peaks, tokens = logits.max(dim=-1)  # the lowest id among equals; NaN counts as highest
        peaks = peaks.float()
        if not self._all_greedy:
            positions = np.array([state.position for state in self._states], dtype=np.uint64)
            uniform = to_device(uniforms(self._keys, positions), self._device).unsqueeze(1)
            for rows, how in ((self._unfiltered, self._draw_unfiltered), (self._filtered, self._draw_filtered)):
                if rows is None:
                    continue
                for part in rows.split(max(1, MAX_SORTED_ELEMENTS // logits.shape[1])):
                    # A row of no finite peak becomes NaN, which no comparison is true of: it draws some valid id.
                    scores = (logits[part].float() - peaks[part, None]) / self._temperature[part]
                    tokens[part] = how(scores, part, uniform[part])
        return torch.stack((tokens.int(), peaks.view(torch.int32)))

    def _draw_unfiltered(self, scores: Tensor, part: Tensor, uniform: Tensor) -> Tensor:
        weights = self._likely(scores.exp_(), part)
        blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK_SIZE)).unflatten(1, (-1, BLOCK_SIZE))
        cumulative = blocks.sum(-1).double().cumsum(1)
        target = _target(uniform, cumulative[:, -1:])
        block = _first_above(cumulative, target)
        before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
        inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK_SIZE)).squeeze(1).double().cumsum(1)
        target = torch.minimum(target - before, _below(inside[:, -1:]))
        return (block * BLOCK_SIZE + _first_above(inside, target)).squeeze(1).clamp(max=scores.shape[1] - 1)

    def _draw_filtered(self, scores: Tensor, part: Tensor, uniform: Tensor) -> Tensor:
        scores, ids = scores.sort(dim=1, descending=True, stable=True)  # the lowest id first among equals
        weights = self._likely(scores.exp_(), part)
        place = torch.arange(weights.shape[1], device=self._device)
        cumulative = weights.masked_fill_(place >= self._top_k[part], 0.0).double().cumsum(1)
        needed = self._top_p[part] * cumulative[:, -1:]
        last = (cumulative < needed).sum(1, keepdim=True).clamp(max=weights.shape[1] - 1)
        target = _target(uniform, cumulative.gather(1, last))
        return ids.gather(1, _first_above(cumulative, target).clamp(max=weights.shape[1] - 1)).squeeze(1)

    def _likely(self, weights: Tensor, part: Tensor) -> Tensor:
        return weights.mul_(weights >= self._min_p[part]) if self._has_min_p else weights


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of an array on a device; through pinned memory, so that the host does not wait, where that is a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _target(uniform: Tensor, mass: Tensor) -> Tensor:
    """Points in [0, mass): the product alone may round up to the mass itself."""
    return torch.minimum(uniform * mass, _below(mass))


def _below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    return (cumulative <= target).sum(1, keepdim=True)
