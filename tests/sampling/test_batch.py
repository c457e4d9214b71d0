"""How rows are grouped."""

from typing import Any

import pytest

from quire.kernels import cpu
from quire.sampling.batch import SamplingBatch
from quire.sampling.state import SamplingState
from quire.sampling_params import SamplingParams

VOCAB_SIZE = 5000


def group(fields: list[dict[str, Any]]) -> list[list[int]]:
    states = [SamplingState(SamplingParams(**values), [], [], 0, 0, (), VOCAB_SIZE) for values in fields]
    return [group.rows for group in SamplingBatch(states, VOCAB_SIZE, cpu).groups]


def test_rows_go_by_how_their_tokens_are_found() -> None:
    fields: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"top_p": 0.9},
        {"beam_width": 2, "temperature": 0},
        {"top_k": 5},
        {"temperature": 0},
        {"top_k": 50, "top_p": 0.9},
    ]
    assert group(fields) == [[0, 5], [1, 2, 4, 6], [3]]


def test_large_groups_of_beams_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.sampling.row_index.MAX_ELEMENTS", 2 * VOCAB_SIZE)
    assert group([{"beam_width": 2, "temperature": 0}] * 5) == [[0, 1], [2, 3], [4]]
    assert group([{}] * 5) == [[0, 1, 2, 3, 4]]


def test_an_empty_batch_has_no_groups() -> None:
    assert group([]) == []
