"""Weights are packed into the given memory while there is room, with the bytes that the kernels pack anywhere."""

import mmap

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
    kernels = PackedWeights(memory).kernels
    area = torch.frombuffer(memory, dtype=torch.uint8) if memory is not None else torch.empty(0, dtype=torch.uint8)
    used = 0
    for _ in range(10):
        for found, expected in (
            (kernels.pack_linear(weights, "bfloat16"), cpu.pack_linear(weights, "bfloat16")),
            (kernels.quantize_linear(weights, 4, 32), cpu.quantize_linear(weights, 4, 32)),
            (kernels.pack_linear(weights, "float32"), cpu.pack_linear(weights, "float32")),
        ):
            for part, other in zip(bytes_of(found), bytes_of(expected), strict=True):
                assert torch.equal(part, other)
                assert part.data_ptr() % 64 == 0
                if used + part.numel() <= num_bytes:
                    assert part.data_ptr() == area.data_ptr() + used
                    used += -(-part.numel() // 64) * 64
    assert used <= num_bytes


def test_everything_else_is_the_kernels_own() -> None:
    kernels = PackedWeights(None).kernels
    assert kernels.linear is cpu.linear
    assert kernels.paged_attention is cpu.paged_attention
