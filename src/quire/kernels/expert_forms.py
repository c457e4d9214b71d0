"""What the matrices of a layer's experts have in common: whether one packed weight can keep their bits."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.blocks import dequantize as dequantize_blocks
from quire.kernels.coded import CodedMatrix, can_join
from quire.kernels.interface import ExpertMatrices, ExpertMatrix, Mxfp4Matrix
from quire.kernels.mxfp4 import dequantize as dequantize_mxfp4
from quire.quantization import WeightFormat

ExpertForm = Literal["floats", "codes", "blocks"]


def alike(
    gate_up: ExpertMatrices, down: ExpertMatrices, stored: str | WeightFormat
) -> tuple[ExpertMatrices, ExpertMatrices]:
    """The same layers, both in floats if one weight form does not serve both."""
    if form_of(gate_up, stored) == form_of(down, stored):
        return gate_up, down
    return in_floats(gate_up), in_floats(down)


def form_of(matrices: ExpertMatrices, stored: str | WeightFormat) -> ExpertForm:
    """How the matrices are packed. Codes and MXFP4 keep their bits, and blocks unless a quantisation replaces them."""
    parts = [part for expert in matrices for part in expert]
    if all(isinstance(part, CodedMatrix) for part in parts):
        return "codes" if _codes_join(coded_parts(matrices)) else "floats"
    if all(isinstance(part, Mxfp4Matrix) for part in parts):
        return "blocks"
    if isinstance(stored, str) and all(isinstance(part, BlockMatrix) for part in parts):
        return "blocks" if _blocks_stack(block_parts(matrices)) else "floats"
    return "floats"


def in_floats(matrices: ExpertMatrices) -> Sequence[Sequence[Tensor]]:
    return [[to_floats(part) for part in expert] for expert in matrices]


def to_floats(matrix: ExpertMatrix) -> Tensor:
    if isinstance(matrix, CodedMatrix):
        return matrix.dequantize()
    if isinstance(matrix, BlockMatrix):
        return dequantize_blocks(matrix)
    return dequantize_mxfp4(matrix) if isinstance(matrix, Mxfp4Matrix) else matrix


def coded_parts(matrices: ExpertMatrices) -> list[list[CodedMatrix]]:
    return [[part for part in expert if isinstance(part, CodedMatrix)] for expert in matrices]


def block_parts(matrices: ExpertMatrices) -> list[list[BlockMatrix]]:
    return [[part for part in expert if isinstance(part, BlockMatrix)] for expert in matrices]


def stack_blocks(experts: Sequence[Sequence[BlockMatrix]]) -> tuple[BlockMatrix, ...]:
    """For each expert the same parts -> every part with rows [E, N, bytes]; no copy if they lie one after another."""
    return tuple(
        BlockMatrix(_stack([part.rows for part in parts]), parts[0].type_name) for parts in zip(*experts, strict=True)
    )


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    storage, size = first.untyped_storage().data_ptr(), first.nbytes
    together = all(
        each.is_contiguous()
        and each.untyped_storage().data_ptr() == storage
        and each.data_ptr() == first.data_ptr() + index * size
        for index, each in enumerate(tensors)
    )
    if not together:
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def _codes_join(experts: Sequence[Sequence[CodedMatrix]]) -> bool:
    first = experts[0][0]
    return all(
        can_join(parts) and parts[0].form == first.form and (parts[0].order is None) == (first.order is None)
        for parts in experts
    )


def _blocks_stack(experts: Sequence[Sequence[BlockMatrix]]) -> bool:
    return len({tuple((part.type_name, part.rows.shape) for part in parts) for parts in experts}) == 1


def stored_tensors(matrices: ExpertMatrices) -> Iterator[Tensor]:
    """Every tensor that the matrices are stored in."""
    for expert in matrices:
        for part in expert:
            if isinstance(part, CodedMatrix):
                yield from (each for each in (part.codes, part.scales, part.offsets) if each is not None)
            elif isinstance(part, BlockMatrix):
                yield part.rows
            else:
                yield from part if isinstance(part, Mxfp4Matrix) else (part,)
