"""Positions of tokens where images have rows and columns."""

import numpy as np

from quire.runner.grid_positions import GridPositions, prompt_positions
from quire.sampling_params import SamplingParams
from quire.step import NewRow, RowFork, StepPlan

IMAGES = ((2, 20, 30), (10, 10, 10))
"""At token 2 one of 2 × 3 tokens, at token 10 one of 1 × 1, with 10 pixels a token."""
EXPECTED = [
    [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8, 9],
    [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9],
    [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9],
]


def new_row(row: int, images: tuple[tuple[int, int, int], ...] = ()) -> NewRow:
    return NewRow(row, SamplingParams(), [1] * 13, [], 0, 0, (), images=images)


def test_a_prompt_with_images() -> None:
    assert prompt_positions(13, IMAGES, 10).tolist() == EXPECTED


def test_chunks_and_output_of_a_batch() -> None:
    grids = GridPositions(4, 10)
    grids.start(new_row(2, IMAGES))
    grids.start(new_row(1))
    plan = StepPlan(rows=[1, 2], num_computed_tokens=[7, 4], num_scheduled_tokens=[2, 12])
    indices = np.array([7, 8, *range(4, 16)], dtype=np.int32)
    first, all_three = grids.apply(plan, indices)
    assert all_three is not None
    expected = [[7, 8, *row[4:], 10, 11, 12] for row in EXPECTED]
    assert all_three.tolist() == expected
    assert first.tolist() == expected[0]
    assert grids.shifts_of([1, 2]) == [0, 3]


def test_steps_behind_the_images_have_one_position() -> None:
    grids = GridPositions(4, 10)
    grids.start(new_row(0, IMAGES))
    plan = StepPlan(rows=[0], num_computed_tokens=[13], num_scheduled_tokens=[2])
    first, all_three = grids.apply(plan, np.array([13, 14], dtype=np.int32))
    assert first.tolist() == [10, 11]
    assert all_three is None


def test_forks_and_new_sequences_in_a_row() -> None:
    grids = GridPositions(4, 10)
    grids.start(new_row(0, IMAGES))
    grids.start(new_row(1))
    grids.fork([RowFork(1, 0, 5), RowFork(0, 1, 5)])
    assert grids.shifts_of([0, 1]) == [0, 3]
    grids.start(new_row(1))
    assert grids.shifts_of([0, 1]) is None


def test_a_model_of_one_position() -> None:
    grids = GridPositions(4, 0)
    grids.start(new_row(0, IMAGES))
    assert grids.shifts_of([0]) is None
