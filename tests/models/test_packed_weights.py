"""Weights are packed into the given memory while there is room, with the bytes that the kernels pack anywhere."""

import mmap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quire.kernels import cpu
from quire.kernels.block_matrix import BlockWeight
from quire.kernels.interface import ExpertMatrices, ExpertWeight, Mxfp4Matrix
from quire.layers.linear import stored_as
from quire.models.packed_weights import PackedWeights, tensors_of
from quire.models.safetensors_weights import SafetensorsWeights
from quire.quantization import METHODS

INT8, INT4 = METHODS["int8"].layers, METHODS["int4"].layers


def bytes_of(packed: ExpertWeight) -> list[torch.Tensor]:
    return [part.view(torch.uint8) for part in tensors_of(packed)]


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
            (packing.quantize_linear(weights, INT4), cpu.quantize_linear(weights, INT4)),
            (packing.pack_linear(weights, "float32"), cpu.pack_linear(weights, "float32")),
        ):
            for part, other in zip(bytes_of(found), bytes_of(expected), strict=True):
                assert torch.equal(part, other)
                assert part.data_ptr() % 64 == 0
                if used + part.numel() <= num_bytes:
                    assert part.data_ptr() == area.data_ptr() + used
                    used += -(-part.numel() // 64) * 64
    assert used <= num_bytes


EXPERTS = [[torch.randn(20, 32), torch.randn(20, 32)] for _ in range(3)]
MXFP4_EXPERTS = [
    [Mxfp4Matrix(torch.randint(0, 256, (40, 1, 16)).byte(), torch.randint(0, 255, (40, 1)).byte())] for _ in range(3)
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("matrices", [EXPERTS, MXFP4_EXPERTS], ids=["floats", "mxfp4"])
def test_experts(matrices: ExpertMatrices, dtype: str) -> None:
    """In memory of the packing as anywhere, and found again by a later load."""
    expected = cpu.pack_experts(matrices, stored_as(dtype))
    if isinstance(expected, BlockWeight):
        expected = cpu.interleave_blocks(expected)
    first = PackedWeights(mmap.mmap(-1, 1 << 16))
    found = first.pack_experts(matrices, stored_as(dtype))
    assert type(found) is type(expected)
    assert all(map(torch.equal, bytes_of(found), bytes_of(expected)))
    assert getattr(found, "interleaved", False) == getattr(expected, "interleaved", False)
    second = PackedWeights(None, first.parts)
    again = second.pack_experts(matrices, stored_as(dtype))
    assert second.num_packed == 0
    assert [part.data_ptr() for part in bytes_of(again)] == [part.data_ptr() for part in bytes_of(found)]
    changed = [*matrices[:2], matrices[0]]
    other = PackedWeights(None, first.parts)
    other.pack_experts(changed, stored_as(dtype))
    assert other.num_packed == 1


def test_what_has_no_room_is_allocated_by_the_caller() -> None:
    allocated: list[torch.Tensor] = []

    def allocate(shape: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
        allocated.append(torch.zeros(shape, dtype=dtype))
        return allocated[-1]

    packed = PackedWeights(None).pack_linear([torch.randn(9, 24)], "float32", allocate)
    assert packed is allocated[0]
    quantized = PackedWeights(None).quantize_linear([torch.randn(9, 32)], INT8, allocate)
    assert [quantized.values.data_ptr(), quantized.scales.data_ptr()] == [x.data_ptr() for x in allocated[1:]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_weight_is_packed_and_released_in_pieces(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "PIECE_BYTES", 2 << 20)
    weight = torch.randn(6144, 1024)
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    source = SafetensorsWeights.open(tmp_path)
    resident = []

    def release(rows: torch.Tensor) -> None:
        resident.append(resident_bytes(tmp_path))
        source.release(rows)

    packing = PackedWeights(mmap.mmap(-1, 24 << 20), release=release)
    view = source.take("layer.weight", (6144, 1024))
    found = packing.pack_linear([view], dtype)
    assert torch.equal(found, cpu.pack_linear([weight], dtype))
    assert len(resident) == 12
    assert 2 << 20 <= max(resident) < 12 << 20  # the system maps more than is read
    assert resident_bytes(tmp_path) < 6 << 20
    assert torch.equal(view, weight)  # what is read again is mapped again
    source.release(weight)  # no view of a file
    quantized = packing.quantize_linear([view], INT8)
    assert all(map(torch.equal, bytes_of(quantized), bytes_of(cpu.quantize_linear([weight], INT8))))
    assert len(resident) == 24


def resident_bytes(folder: Path) -> int:
    """Bytes in memory of the files mapped from a folder."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begins = [index for index, line in enumerate(lines) if str(folder) in line]
    return sum(
        int(next(line for line in lines[begin:] if line.startswith("Rss:")).split()[1]) << 10 for begin in begins
    )


@pytest.mark.parametrize("shape", [(1, 2), (33, 64), (40, 63), (7, 300)])
def test_bfloat16_is_packed_as_it_is(shape: tuple[int, int]) -> None:
    """Whether pairs of it are copied or single numbers are converted."""
    weight = torch.randn(shape).bfloat16()
    weight[0, :2] = torch.tensor([float("inf"), -0.0])
    other = torch.randn(5, shape[1]).bfloat16()
    for parts in ([weight], [weight, other], [weight.t().contiguous().t()]):
        expected = cpu.pack_linear([part.float() for part in parts], "bfloat16")
        assert torch.equal(cpu.pack_linear(parts, "bfloat16").view(torch.int16), expected.view(torch.int16))
