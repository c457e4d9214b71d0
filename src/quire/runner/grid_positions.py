"""GridPositions: the positions of tokens where an image has rows and columns (Qwen2.5-VL's rotary embedding).

A token has a temporal, a vertical and a horizontal position. In a text the three are equal and grow by one. A token of
an image lies in the image's row and column, counted from the position where the image starts; what follows the image
goes on behind its longer edge. So positions after an image are smaller than the tokens' indices, by a shift.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quire.step import NewRow, RowFork, StepPlan

Int32Array = NDArray[np.int32]


class GridPositions:
    """The positions of the rows whose prompts have images."""

    def __init__(self, max_num_seqs: int, pixels_per_token: int) -> None:
        """`pixels_per_token`: pixels of an image in each direction of one token; 0: the model has one position."""
        self._pixels_per_token = pixels_per_token
        self._prompts: dict[int, Int32Array] = {}
        """Row → [3, prompt tokens]."""
        self._shifts = [0] * max_num_seqs
        """What the positions behind the prompt are smaller by than indices."""

    def start(self, new: NewRow) -> None:
        """A sequence starts in a row."""
        self._prompts.pop(new.row, None)
        self._shifts[new.row] = 0
        if new.images and self._pixels_per_token:
            prompt = prompt_positions(len(new.prompt_token_ids), new.images, self._pixels_per_token)
            self._prompts[new.row] = prompt
            self._shifts[new.row] = prompt.shape[1] - 1 - int(prompt.max())

    def fork(self, forks: Sequence[RowFork]) -> None:
        """Beams go on in other rows; all rows are read before any is written."""
        if not self._prompts:
            return
        sources = [(fork.row, self._prompts.get(fork.source), self._shifts[fork.source]) for fork in forks]
        for row, prompt, shift in sources:
            self._shifts[row] = shift
            if prompt is None:
                self._prompts.pop(row, None)
            else:
                self._prompts[row] = prompt

    def shifts_of(self, rows: Sequence[int]) -> list[int] | None:
        """The shift of each row behind its prompt; None if no row has one."""
        return [self._shifts[row] for row in rows] if self._prompts else None

    def apply(self, plan: StepPlan, indices: Int32Array) -> tuple[Int32Array, Int32Array | None]:
        """The temporal position of each token of a step [T], whose indices in their sequences are given, and all three
        [3, T] where they differ."""
        if not self._prompts or not any(row in self._prompts for row in plan.rows):
            return indices, None
        found = np.repeat(indices[None], 3, axis=0)
        end = 0
        for row, start, count in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            begin, end = end, end + count
            prompt = self._prompts.get(row)
            if prompt is None:
                continue
            inside = min(max(prompt.shape[1] - start, 0), count)
            found[:, begin : begin + inside] = prompt[:, start : start + inside]
            found[:, begin + inside : end] -= self._shifts[row]
        differs = (found[0] != found[1]).any() or (found[0] != found[2]).any()
        return np.ascontiguousarray(found[0]), found if differs else None


def prompt_positions(num_tokens: int, images: Sequence[tuple[int, int, int]], pixels_per_token: int) -> Int32Array:
    """[3, num_tokens]: the positions of a prompt with images, given as (index of the first token, height, width)."""
    positions = np.empty((3, num_tokens), dtype=np.int32)
    index, position = 0, 0
    for offset, height, width in images:
        positions[:, index:offset] = position + np.arange(offset - index)
        position += offset - index
        rows, columns = height // pixels_per_token, width // pixels_per_token
        index = offset + rows * columns
        positions[0, offset:index] = position
        positions[1, offset:index] = position + np.repeat(np.arange(rows), columns)
        positions[2, offset:index] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
    positions[:, index:] = position + np.arange(num_tokens - index)
    return positions
