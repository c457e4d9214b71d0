"""Log-probabilities against torch's log_softmax, and ranks against a sort."""

import tracemalloc

import numpy as np
import pytest
import torch

from quire.sampling.logprobs import processed_logprobs, token_logprobs
from quire.sampling_params import SamplingParams
from quire.step import logprob_bytes


@pytest.mark.parametrize("vocab_size", [1, 5, 1000, 9001])
@pytest.mark.parametrize("k", [0, 1, 5, -1])
def test_equals_log_softmax_and_a_sort(vocab_size: int, k: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(6, vocab_size, generator=generator) * 4
    chosen = [row % vocab_size for row in (0, 4, 999, 7, 3, 2)]
    expected = logits.double().log_softmax(-1)
    found = token_logprobs(logits, chosen, k)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    num_top = vocab_size if k < 0 else min(k, vocab_size)
    for row, (entry, token_id) in enumerate(zip(found, chosen, strict=True)):
        assert entry.token_ids == [token_id, *order[row, :num_top]]
        assert entry.ranks == [1 + order[row].tolist().index(token_id), *range(1, num_top + 1)]
        np.testing.assert_allclose(entry.logprobs, expected[row, entry.token_ids], atol=2e-6)


def test_tied_tokens_rank_by_id() -> None:
    (entry,) = token_logprobs(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), [3], 4)
    assert entry.ranks == [4, 1, 2, 3, 4]
    assert entry.token_ids == [3, 1, 0, 2, 3]


def test_a_row_does_not_notice_its_piece() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    targets = list(range(50))
    whole = token_logprobs(logits, targets, 3)
    pieces = [token_logprobs(logits[i : i + 7], targets[i : i + 7], 3) for i in range(0, 50, 7)]
    assert whole == [entry for piece in pieces for entry in piece]


def test_no_positions() -> None:
    assert token_logprobs(torch.empty(0, 10), [], 3) == []


@pytest.mark.parametrize("k", [0, 5, -1])
def test_a_position_keeps_within_the_bytes_it_is_planned_with(k: int) -> None:
    """What Python and NumPy allocate, which is all but topk's own scratch, measured beside the logits."""
    vocab_size, rows = 50_000, 4
    logits = torch.randn(rows, vocab_size)
    token_logprobs(logits, [0] * rows, k)
    tracemalloc.start()
    token_logprobs(logits, [0] * rows, k)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    lists = 0 if k == 0 else rows * (vocab_size if k < 0 else k) * 3 * (8 + 32)  # the result itself, in Python's boxes
    assert logits.nbytes + peak <= rows * logprob_bytes(vocab_size, k) + lists + 100_000


# -- processed --------------------------------------------------------------------------------------------------------


def plain_logprobs(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The definition, in float64: temperature, then min_p, top_k and top_p, then a softmax of what is left."""
    if params.greedy:
        scaled = logits.astype(np.float64)
    else:
        scaled = logits.astype(np.float64) / params.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities[probabilities < params.min_p] = 0.0
        order = np.argsort(-logits, kind="stable")
        if params.top_k > 0:
            probabilities[order[params.top_k :]] = 0.0
        probabilities /= probabilities.sum()
        before = probabilities[order].cumsum() - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0.0
        scaled = np.where(probabilities > 0, scaled, -np.inf)
    shifted = scaled - scaled.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


@pytest.mark.parametrize("vocab_size", [1, 40, 9001])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.0, "top_k": 3},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.8},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"top_k": 12, "top_p": 0.7, "min_p": 0.02, "temperature": 1.3},
        {"top_p": 0.9, "min_p": 0.01, "temperature": 2.0},
    ],
    ids=str,
)
def test_processed_equals_the_plain_definition(vocab_size: int, asked: dict[str, float]) -> None:
    row = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 2
    peak = row.max()
    row[vocab_size // 2 :: 3] = -torch.inf  # as a ban leaves them
    row[0] = row[vocab_size // 3] = peak  # tied for the first place
    for k in (0, 5, -1):
        params = SamplingParams(logprobs=k, logprobs_mode="processed_logprobs", **asked)
        expected = plain_logprobs(row.numpy(), params)
        order = np.argsort(-row.numpy(), kind="stable")
        entry = processed_logprobs(row, 0, params)
        num_top = vocab_size if k < 0 else min(k, vocab_size)
        assert entry.token_ids == [0, *order[:num_top]]
        assert entry.ranks == [1, *range(1, num_top + 1)]
        np.testing.assert_allclose(entry.logprobs, expected[entry.token_ids], atol=1e-9)


def test_a_token_sampled_at_the_edge_of_a_filter_is_not_given_as_impossible() -> None:
    params = SamplingParams(top_p=0.5, logprobs=3, logprobs_mode="processed_logprobs")
    entry = processed_logprobs(torch.zeros(4), 2, params)
    np.testing.assert_allclose(entry.logprobs[:4], -np.log(3))
