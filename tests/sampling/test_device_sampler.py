"""The device samples what the host samples from the same logits with the same random numbers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.kernels import cpu
from quire.kernels.transfer import send
from quire.sampling.device_sampler import KERNEL_COLUMNS, DeviceSampler, can_sample_on_device, read_samples
from quire.sampling.sampler import NO_TOKEN, Sampler
from quire.sampling.state import SamplingState
from quire.sampling_params import SamplingParams

CPU = torch.device("cpu")
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.4, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.5, "top_k": 40},
    {"temperature": 1.0, "top_k": 200, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 3.0, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.02},
]


def states(vocab_size: int, count: int, position: int = 3, **more: Any) -> list[SamplingState]:
    return [
        SamplingState(
            params=SamplingParams(**{**KINDS[index % len(KINDS)], **more}),
            prompt_token_ids=[1],
            output_token_ids=[2] * position,
            seed=index,
            sample_index=index % 3,
            stop_token_ids=(),
            vocab_size=vocab_size,
        )
        for index in range(count)
    ]


def sample_on_device(sampler: DeviceSampler, logits: Tensor, batch: list[SamplingState]) -> tuple[list[int], Tensor]:
    tokens, bits = sampler.sample(logits, send(sampler.columns(batch), CPU), with_logprobs=False)
    return tokens.tolist(), bits.view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in bfloat16 many logits are equal
@pytest.mark.parametrize("vocab_size", [7, 300, 5_000])
def test_the_host_samples_the_same(vocab_size: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(vocab_size)
    device, host = DeviceSampler(vocab_size), Sampler(vocab_size, 2**24, cpu)
    batch = states(vocab_size, 4 * len(KINDS))
    for _ in range(12):
        logits = (3 * torch.randn(len(batch), vocab_size, generator=random)).to(dtype)
        expected = host.sample(logits.float(), batch).token_ids
        tokens, max_logits = sample_on_device(device, logits, batch)
        assert tokens == expected
        assert torch.equal(max_logits, logits.float().amax(1))
        for state, token in zip(batch, tokens, strict=True):
            state.fill_placeholder(state.append_placeholder(), token)


def test_a_row_that_cannot_be_sampled_shows_in_its_highest_logit() -> None:
    logits = torch.randn(4 * len(KINDS), 300)
    logits[0, 5], logits[7, 9], logits[8] = float("nan"), float("inf"), float("-inf")
    batch = states(300, len(logits))
    expected = Sampler(300, 2**24, cpu).sample(logits.clone(), batch)
    tokens, max_logits = sample_on_device(DeviceSampler(300), logits, batch)
    is_finite = max_logits.isfinite().tolist()
    assert is_finite == [error is None for error in expected.errors]
    assert [token if fine else NO_TOKEN for token, fine in zip(tokens, is_finite, strict=True)] == expected.token_ids
    assert all(0 <= token < 300 for token in tokens)


def test_kernels_get_the_parameters_of_each_row() -> None:
    seen: dict[str, Any] = {}

    def sample(logits: Tensor, rows: SimpleNamespace) -> tuple[Tensor, Tensor]:
        seen.update(vars(rows))
        return logits.argmax(1), logits.amax(1)

    kernels: Any = SimpleNamespace(SamplingRows=SimpleNamespace, sample=sample)
    logits, batch = torch.randn(len(KINDS), 300), states(300, len(KINDS))
    tokens, max_logits = sample_on_device(DeviceSampler(300, kernels), logits, batch)
    assert tokens == logits.argmax(1).tolist()
    assert torch.equal(max_logits, logits.amax(1))
    assert seen["temperature"].tolist() == pytest.approx([kind["temperature"] for kind in KINDS])
    assert seen["top_k"].tolist() == [kind.get("top_k", 300) for kind in KINDS]
    assert seen["top_p"].tolist() == [kind.get("top_p", 1.0) for kind in KINDS]
    assert seen["min_p"].tolist() == pytest.approx([kind.get("min_p", 0.0) for kind in KINDS])
    assert seen["positions"].tolist() == [3] * len(KINDS)
    assert {name: value.dtype for name, value in seen.items()} == {
        "temperature": torch.float32,
        "top_k": torch.int32,
        "top_p": torch.float64,
        "min_p": torch.float32,
        "keys": torch.int64,
        "positions": torch.int64,
    }
    assert len(np.unique(seen["keys"])) == len(KINDS)
    columns = DeviceSampler(300, kernels).columns(batch)
    assert {name: value.dtype for name, value in columns.items()} == {
        name: value.dtype for name, value in KERNEL_COLUMNS.items()
    }, "what a graph keeps room for"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [7, 5_000])
def test_the_host_gives_the_same_log_probabilities(vocab_size: int, dtype: torch.dtype) -> None:
    """Some rows ask for log-probabilities; one of them cannot be sampled and has none."""
    logits = (3 * torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[3, 5] = float("nan")
    logits[4, 2], logits[4, 4] = 0.0, -0.0
    batch = [states(vocab_size, 1, logprobs=count)[0] for count in (None, 0, 20, 3, 5, None, 1, 20, 0)]
    sampler = DeviceSampler(vocab_size)
    samples = sampler.sample(logits, send(sampler.columns(batch), CPU), with_logprobs=True)
    padded = torch.cat((samples, samples[:, :3]), 1).numpy()
    found, expected = read_samples(padded, batch), Sampler(vocab_size, 2**24, cpu).sample(logits.float(), batch)
    assert (found.token_ids, found.errors) == (expected.token_ids, expected.errors)
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.token_ids, one.ranks) == (other.token_ids, other.ranks)
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-6)


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": 21},
        {"logprobs": -1},
        {"logprobs": 2, "logprobs_mode": "processed_logprobs"},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 9},
        {"presence_penalty": 0.1},
        {"allowed_token_ids": [4]},
    ],
    ids=str,
)
def test_rows_that_ask_for_more_are_sampled_on_the_host(more: dict[str, Any]) -> None:
    assert all(map(can_sample_on_device, states(300, len(KINDS))))
    assert not any(map(can_sample_on_device, states(300, len(KINDS), **more)))
