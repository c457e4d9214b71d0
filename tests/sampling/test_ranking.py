"""The leading tokens against a full stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.sampling.ranking import top_tokens


def expected_ids(scores: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@settings(max_examples=60)
@given(
    vocab_size=st.sampled_from([1, 2, 33, 300, 5003]),
    k=st.sampled_from([1, 2, 7, 64, 400]),
    levels=st.sampled_from([1, 3, 50, 2**24]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_a_stable_sort_with_few_and_with_many_ties(vocab_size: int, k: int, levels: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(levels, size=(3, vocab_size)).astype(np.float32)
    values, ids = top_tokens(torch.from_numpy(scores), k)
    np.testing.assert_array_equal(ids, expected_ids(scores, k))
    np.testing.assert_array_equal(values, np.take_along_axis(scores, ids, axis=1))


@pytest.mark.parametrize("vocab_size", [100, 9001])
def test_masked_tokens_come_last(vocab_size: int) -> None:
    scores = np.full((2, vocab_size), -np.inf, dtype=np.float32)
    scores[0, [3, 50, 99]] = 1.0, 2.0, 1.0
    scores[1, vocab_size - 1] = 0.0
    values, ids = top_tokens(torch.from_numpy(scores), 5)
    assert ids[0, :3].tolist() == [50, 3, 99]
    assert ids[1, 0] == vocab_size - 1
    assert np.isneginf(values[0, 3:]).all()
    assert np.isneginf(values[1, 1:]).all()
