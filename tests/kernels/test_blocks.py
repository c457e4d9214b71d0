"""The blocks of GGUF: every type against the gguf package's dequantiser, on random bits."""

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from quire.gguf.block_types import BLOCK_TYPES, BLOCK_TYPES_BY_NAME
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.blocks import dequantize

TYPES = [block.name for block in BLOCK_TYPES.values() if not block.is_float]
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}
"""Where the float16 numbers of a block lie; in other types at its start."""
SECOND_HALF = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")


def random_matrix(name: str, num_rows: int, num_blocks: int, seed: int = 0) -> BlockMatrix:
    """A matrix of random bits whose scales are finite."""
    generator = np.random.default_rng(seed)
    block = BLOCK_TYPES_BY_NAME[name]
    blocks = generator.integers(0, 256, (num_rows * num_blocks, block.num_bytes), dtype=np.uint8)
    for at in HALVES.get(name, (0, 2) if name in SECOND_HALF else (0,)):
        scales = generator.normal(scale=0.01, size=(len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = generator.integers(110, 124, len(blocks))
    return BlockMatrix(torch.from_numpy(blocks.reshape(num_rows, -1)), name)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_dequantised_as_llama_cpp_does(name: str) -> None:
    matrix = random_matrix(name, 5, 3)
    expected = quants.dequantize(matrix.rows.numpy(), gguf.GGMLQuantizationType[name])
    found = dequantize(matrix)
    assert found.shape == matrix.shape == (5, 3 * BLOCK_TYPES_BY_NAME[name].num_values)
    assert np.array_equal(found.numpy(), expected.reshape(found.shape))


def test_selected_rows_are_those_of_the_matrix() -> None:
    matrix = random_matrix("Q4_K", 6, 1)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(dequantize(matrix.select_rows(rows)), dequantize(matrix)[rows])
