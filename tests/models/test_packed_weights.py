"""Weights are packed into the given memory while there is room, with the bytes that the kernels pack anywhere."""

import mmap
from collections.abc import Sequence

import pytest
import torch

from quire.kernels import cpu
from quire.kernels.interface import QuantizedWeight
from quire.models.packed_weights import PackedWeights


def bytes_of(packed: torch.Tensor | QuantizedWeight) -> list[torch.Tensor]:
    parts = [packed.values, packed.scales] if isinstance(packed, QuantizedWeight) else [packed]
    return [part.view(torch.uint8) for part in parts]


@pytest.mark.parametrize("num_bytes", [0, 1 << 16, 1 << 20])
def test_in_memory_while_there_is_room(num_bytes: int) -> None:
    weights = [torch.randn(40, 24), torch.randn(9, 24)]
    memory = mmap.mmap(-1, num_bytes) if num_bytes else None
    packing = PackedWeights(memory)
    area = torch.frombuffer(memory, dtype=torch.uint8) if memory is not None else torch.empty(0, dtype=torch.uint8)
    used = 0
    for _ in range(10):
        for found, expected in (
            (packing.pack_linear(weights, "bfloat16"), cpu.pack_linear(weights, "bfloat16")),
            (packing.quantize_linear(weights, 4, 32), cpu.quantize_linear(weights, 4, 32)),
            (packing.pack_linear(weights, "float32"), cpu.pack_linear(weights, "float32")),
        ):
            for part, other in zip(bytes_of(found), bytes_of(expected), strict=True):
                assert torch.equal(part, other)
                assert part.data_ptr() % 64 == 0
                if used + part.numel() <= num_bytes:
                    assert part.data_ptr() == area.data_ptr() + used
                    used += -(-part.numel() // 64) * 64
    assert used <= num_bytes


def test_what_has_no_room_is_allocated_by_the_caller() -> None:
    allocated: list[torch.Tensor] = []

    def allocate(shape: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
        allocated.append(torch.zeros(shape, dtype=dtype))
        return allocated[-1]

    packed = PackedWeights(None).pack_linear([torch.randn(9, 24)], "float32", allocate)
    assert packed is allocated[0]
    quantized = PackedWeights(None).quantize_linear([torch.randn(9, 32)], 8, 32, allocate)
    assert [quantized.values.data_ptr(), quantized.scales.data_ptr()] == [x.data_ptr() for x in allocated[1:]]
