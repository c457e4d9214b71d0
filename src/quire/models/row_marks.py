"""RowMarks: stand-ins for the matrices of dense layers, from which can be read what a packed weight is made of.

A stand-in has the shape of its matrix and a number of its own in every row. Families select, reorder and join rows;
the numbers that arrive where a weight is packed say from which layers and rows it is made.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from quire.errors import CheckpointError

_MOST_ROWS = 2**31 - 1
_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Origin:
    """Rows of one layer's matrix, in the order of a packed weight."""

    layer: str
    shape: tuple[int, int]
    rows: Tensor | None
    """int64; None: all, as they are stored."""


class RowMarks:
    """The stand-ins of one model."""

    def __init__(self) -> None:
        self._layers: dict[str, int] = {}
        """Layer → its index in the lists below."""
        self._names: list[str] = []
        self._shapes: list[tuple[int, int]] = []
        self._begins: list[int] = []
        """The number of each layer's first row."""
        self._end = 0

    def of(self, layer: str, shape: tuple[int, int]) -> Tensor:
        """The stand-in of a layer's matrix: int32 of `shape`, without memory of its own."""
        index = self._layers.get(layer)
        if index is None:
            index = self._layers[layer] = len(self._names)
            self._names.append(layer)
            self._shapes.append(shape)
            self._begins.append(self._end)
            self._end += shape[0]
            if self._end > _MOST_ROWS:
                raise CheckpointError(f"the layers have {self._end} outputs; supported: up to {_MOST_ROWS}")
        begin = self._begins[index]
        return torch.arange(begin, begin + shape[0], dtype=torch.int32)[:, None].expand(shape)

    def origins_of(self, matrix: Tensor) -> list[Origin]:
        """What a matrix of stand-ins is made of, from its first row to its last."""
        marks = matrix[:, 0].long()
        origins, at = [], 0
        while at < len(marks):
            index = bisect_right(self._begins, int(marks[at])) - 1
            begin, shape = self._begins[index], self._shapes[index]
            inside = (marks[at:] >= begin) & (marks[at:] < begin + shape[0])
            count = len(inside) if bool(inside.all()) else int(inside.int().argmin())
            rows = marks[at : at + count] - begin
            is_whole = count == shape[0] and torch.equal(rows, torch.arange(count))
            origins.append(Origin(self._names[index], shape, None if is_whole else rows))
            at += count
        return origins


def is_stand_in(matrix: object) -> bool:
    """Whether a matrix came from `RowMarks`: no checkpoint has matrices of int32."""
    return isinstance(matrix, Tensor) and matrix.dtype == torch.int32


def key_of(form: str, origins: Sequence[Sequence[Origin]]) -> str:
    """The name of a packed weight: a hash of how it is packed, and of the rows that each of its matrices is made of."""
    digest = blake2b(form.encode(), digest_size=_KEY_BYTES)
    for matrix in origins:
        digest.update(b"[")
        for origin in matrix:
            digest.update(json.dumps([origin.layer, *origin.shape]).encode())
            if origin.rows is not None:
                digest.update(origin.rows.numpy().tobytes())
    return digest.hexdigest()
