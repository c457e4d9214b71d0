"""Reported log-probabilities against torch's log_softmax, and ranks against a sort."""

import numpy as np
import pytest
import torch

from quire.sampling import prompt_logprobs
from quire.sampling.logprobs import token_logprobs


@pytest.mark.parametrize("vocab_size", [1, 5, 1000, 9001])
@pytest.mark.parametrize("k", [0, 1, 5, -1])
def test_equals_log_softmax_and_a_sort(vocab_size: int, k: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(6, vocab_size, generator=generator) * 4
    chosen = [row % vocab_size for row in (0, 4, 999, 7, 3, 2)]
    expected = logits.double().log_softmax(-1)
    reports = token_logprobs(logits, chosen, k)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    num_leading = vocab_size if k < 0 else min(k, vocab_size)
    for row, (report, token_id) in enumerate(zip(reports, chosen, strict=True)):
        assert report.token_ids == [token_id, *order[row, :num_leading]]
        assert report.ranks == [1 + order[row].tolist().index(token_id), *range(1, num_leading + 1)]
        np.testing.assert_allclose(report.logprobs, expected[row, report.token_ids], atol=2e-6)


def test_tied_tokens_rank_by_id() -> None:
    (report,) = token_logprobs(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), [3], 4)
    assert report.ranks == [4, 1, 2, 3, 4]
    assert report.token_ids == [3, 1, 0, 2, 3]


def test_a_long_prompt_is_the_sum_of_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    targets = list(range(50))
    whole = prompt_logprobs(logits, targets, 3)
    monkeypatch.setattr("quire.sampling.logprobs.MAX_CHUNK_ELEMENTS", 7 * 300)
    assert prompt_logprobs(logits, targets, 3) == whole
    assert whole == [prompt_logprobs(logits[i : i + 1], targets[i : i + 1], 3)[0] for i in range(50)]


def test_no_positions() -> None:
    assert prompt_logprobs(torch.empty(0, 10), [], 3) == []
