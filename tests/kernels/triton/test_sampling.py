"""Sampling on a GPU, or in Triton's interpreter, draws what the CPU's sampler draws."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from quire.backends import BACKENDS
from quire.kernels import cpu
from quire.kernels.transfer import send
from quire.sampling.device_sampler import DeviceSampler
from quire.sampling.logprobs import token_logprobs
from quire.sampling.sampler import Sampler
from quire.sampling.state import SamplingState
from quire.sampling.uniforms import stream_keys
from quire.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value|divide by zero|All-NaN slice) encountered:RuntimeWarning"
    ),
]

VOCAB_SIZE = 4500  # more than a chunk, and no multiple of one

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.02},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 0.9, "top_k": 200, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 0.3, "min_p": 0.01},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.01, "top_k": 4000},  # nearly all tokens are far below the highest,
    {"temperature": 50.0, "top_k": 300, "top_p": 0.999},  # and none is
]


def states_of(params: list[dict[str, Any]]) -> list[SamplingState]:
    return [
        SamplingState(
            params=SamplingParams(**each, max_tokens=100),
            prompt_token_ids=[1] * (3 + index % 5),
            output_token_ids=[2] * (index % 7),
            seed=1000 + index,
            sample_index=index % 2,
            stop_token_ids=[],
            vocab_size=VOCAB_SIZE,
        )
        for index, each in enumerate(params)
    ]


def rows_of(states: list[SamplingState], device: torch.device) -> Any:
    from quire.kernels.triton.sampling import SamplingRows

    params = [state.params for state in states]
    keys = stream_keys([state.seed for state in states], [state.sample_index for state in states])
    return SamplingRows(
        temperature=torch.tensor([0.0 if each.greedy else each.temperature for each in params], device=device),
        top_k=torch.tensor([each.top_k for each in params], dtype=torch.int32, device=device),
        top_p=torch.tensor([each.top_p for each in params], dtype=torch.float64, device=device),
        min_p=torch.tensor([each.min_p for each in params], device=device),
        keys=torch.from_numpy(keys.view(np.int64)).to(device),
        positions=torch.tensor([state.position for state in states], device=device),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16 has many equal logits
def test_the_draws_of_a_cpu(kernels: Any, device: torch.device, dtype: torch.dtype) -> None:
    from quire.kernels.triton.sampling import sample

    states = states_of(PARAMS)
    generator = torch.Generator().manual_seed(7)
    logits = (3 * torch.randn(len(states), VOCAB_SIZE, generator=generator)).to(dtype)
    logits[5, 4096:] -= 9.0  # a chunk that need not be looked at
    logits[8, :4096] -= 9.0
    logits[4, ::3] = float("-inf")
    logits[6, :20] = 9.0  # the nucleus ends among equals
    expected = Sampler(VOCAB_SIZE, 1 << 30, cpu).sample(logits.float().clone(), states)  # it overwrites them
    tokens, peaks = sample(logits.float().to(device), rows_of(states, device))
    assert expected.errors == [None] * len(states)
    assert tokens.tolist() == expected.token_ids
    assert torch.equal(peaks.cpu(), logits.float().amax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_runners_sampler_draws_with_them(kernels: Any, device: torch.device, dtype: torch.dtype) -> None:
    own = import_module(BACKENDS["triton"].sampling)
    states = states_of(PARAMS)
    logits = (3 * torch.randn(len(states), VOCAB_SIZE, generator=torch.Generator().manual_seed(8))).to(dtype)
    expected = Sampler(VOCAB_SIZE, 1 << 30, cpu).sample(logits.float().clone(), states).token_ids  # it overwrites them
    sampler = DeviceSampler(VOCAB_SIZE, own)
    tokens, bits = sampler.sample(logits.to(device), send(sampler.columns(states), device), with_logprobs=False)
    assert tokens.tolist() == expected
    assert torch.equal(bits.view(torch.float32).cpu(), logits.float().amax(1))


def test_a_row_without_a_finite_peak_has_no_token(kernels: Any, device: torch.device) -> None:
    from quire.kernels.triton.sampling import sample

    states = states_of(PARAMS[:4])
    logits = torch.randn(4, VOCAB_SIZE)
    sound = sample(logits.to(device), rows_of(states, device))[0].tolist()
    logits[0, 4200], logits[1, 1400], logits[2] = float("nan"), float("inf"), float("-inf")
    tokens, peaks = sample(logits.to(device), rows_of(states, device))
    assert peaks.isfinite().tolist() == [False, False, False, True]
    assert peaks[0].isnan()
    assert tokens.tolist() == [0, 0, 0, sound[3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reports(kernels: Any, device: torch.device, dtype: torch.dtype) -> None:
    from quire.kernels.triton.sampling import report

    logits = (4 * torch.randn(5, VOCAB_SIZE)).to(dtype)
    logits[1, 5] = logits[1, 1200] = logits[1].amax()
    logits[2, 4090:4100] = 30.0  # in two chunks
    logits[3, 1:] = float("-inf")
    logits[3, 7], logits[3, 9] = 0.0, -0.0
    tokens, counts = [17, 1200, 4095, 9, 3], [1, 21, 8, 3, 0]
    on_device = [torch.tensor(each, dtype=torch.int32, device=device) for each in (tokens, counts)]
    found = report(logits.to(device), *on_device, 20).cpu()
    for row, (token, count) in enumerate(zip(tokens, counts, strict=True)):
        if count:
            (expected,) = token_logprobs(logits[row : row + 1].float(), [token], count - 1)
            assert [token, *found[2 : 1 + count, row].tolist()] == expected.token_ids
            assert found[0, row].item() == expected.ranks[0]
            logprobs = found[[1, *range(22, 21 + count)], row].contiguous().view(torch.float32)
            assert logprobs.tolist() == pytest.approx(expected.logprobs, abs=2e-6)
