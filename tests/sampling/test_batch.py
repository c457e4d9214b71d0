"""How rows are grouped."""

from typing import Any

import pytest

from quire.sampling.batch import SamplingBatch
from quire.sampling.state import Draw, SamplingState
from quire.sampling_params import SamplingParams

VOCAB_SIZE = 5000


def group(fields: list[dict[str, Any]]) -> list[tuple[Draw, list[int]]]:
    states = [SamplingState(SamplingParams(**values), [], [], 0, 0, (), VOCAB_SIZE) for values in fields]
    return [(group.draw, group.rows) for group in SamplingBatch(states, VOCAB_SIZE).groups]


def test_rows_go_by_what_they_need() -> None:
    fields: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"top_p": 0.9},
        {"top_k": 5},
        {"temperature": 0},
        {"top_k": 50, "top_p": 0.9},
    ]
    assert group(fields) == [
        (Draw.GREEDY, [0, 4]),
        (Draw.UNFILTERED, [1]),
        (Draw.TOP_P, [2]),
        (Draw.TOP_K, [3, 5]),
    ]


def test_a_large_k_is_not_sought_for_rows_of_small_k() -> None:
    assert group([{"top_k": 5}, {"top_k": 4000}, {"top_k": 50}]) == [(Draw.TOP_K, [0, 2]), (Draw.TOP_K, [1])]


def test_large_groups_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.sampling.row_places.MAX_ELEMENTS", 2 * VOCAB_SIZE)
    assert [rows for _, rows in group([{}] * 5)] == [[0, 1], [2, 3], [4]]


def test_an_empty_batch_has_no_groups() -> None:
    assert group([]) == []
