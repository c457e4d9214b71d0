"""pack_panels: a `CodedWeight` in the layout of csrc/coded_linear.h, and how the kernels call its codes."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from quire.kernels.coded import CodedMatrix, CodedWeight, join
from quire.kernels.interface import Allocate
from quire.quantization.levels import E4M3, SIGNED_BYTES, Levels

_RUN = 8
"""Inputs whose codes lie together."""


@cache
def kind_of(levels: Levels) -> tuple[str, tuple[float, ...], int]:
    """The kernels' name of a kind of codes, its numbers, and the bits of a code that are turned over when it is packed.
    Raises `ValueError` for levels that no kernel has."""
    bits = 4 if len(levels) == 16 else 8
    if levels == SIGNED_BYTES:
        return "integers8", (128.0,), 128
    if repr(levels) == repr(E4M3):  # NaN is not equal to itself
        return "float8", (), 0
    if all(level == levels[0] + index for index, level in enumerate(levels)):
        return f"integers{bits}", (-levels[0],), 0
    if bits == 4:
        return "table", levels, 0
    raise ValueError("levels of 8 bits: the kernels have integers and e4m3")


def pack_panels(matrices: Sequence[CodedMatrix], panel: int, allocate: Allocate) -> CodedWeight:
    """One weight of the outputs of all matrices; `panel` outputs lie together."""
    whole = join(matrices)
    num_outputs, num_inputs = whole.shape
    _, _, flipped = kind_of(whole.levels)
    num_panels, num_runs = -(-num_outputs // panel), -(-num_inputs // _RUN)
    words = 1 if len(whole.levels) == 16 else 2
    codes = allocate((num_panels, num_runs, words, panel, 4), dtype=torch.uint8)
    for index in range(num_panels):
        rows = whole.codes[index * panel : (index + 1) * panel]
        runs = functional.pad(rows, (0, num_runs * _RUN - num_inputs)).view(len(rows), num_runs, 2, 4) ^ flipped
        if words == 1:
            codes[index, :, 0, : len(rows)] = (runs[:, :, 0] | runs[:, :, 1] << 4).transpose(0, 1)
        else:
            codes[index, :, :, : len(rows)] = runs.permute(1, 2, 0, 3)

    def of_panels(groups: Tensor) -> Tensor:
        """[N, G] -> [panels, G, panel]"""
        packed = allocate((num_panels, groups.shape[1], panel), dtype=groups.dtype)
        padded = functional.pad(groups, (0, 0, 0, num_panels * panel - num_outputs))
        return packed.copy_(padded.view(num_panels, panel, -1).transpose(1, 2))

    return CodedWeight(
        codes,
        of_panels(whole.scales),
        None if whole.offsets is None else of_panels(whole.offsets),
        whole.zeros is not None,
        whole.group_size,
        whole.levels,
        None if whole.order is None else whole.order.int(),
    )
