"""Arguments of the C++ kernels, made of the weights and caches that `cpu` takes."""

from torch import Tensor

from quire.kernels import _cpu
from quire.kernels.block_matrix import BlockWeight
from quire.kernels.coded import CodedWeight
from quire.kernels.coded_panels import kind_of
from quire.kernels.interface import ExpertWeight, KVLayer, QuantizedWeight
from quire.quantization import WeightFormat


def form_of(stored: WeightFormat) -> tuple[int, int, bool]:
    return stored.bits, stored.group_size, stored.rotates


def parts_of(weight: ExpertWeight) -> tuple[str, bool, Tensor, Tensor | None, int]:
    """The name of the format in csrc/bindings/experts.cpp, whether rows are rotated, values, scales, and inputs that
    share a scale."""
    if isinstance(weight, QuantizedWeight):
        stored = weight.stored
        return f"int{stored.bits}", stored.rotates, weight.values, weight.scales, stored.group_size
    assert isinstance(weight, Tensor), "both layers of experts are packed in one form"
    return str(weight.dtype).removeprefix("torch."), False, weight, None, 1


def blocks_of(weight: BlockWeight) -> "_cpu.Blocks":
    rows, types = zip(*((part.rows, part.type_name) for part in weight.parts), strict=True)
    return rows, types, weight.both_digits, weight.interleaved


def codes_of(weight: CodedWeight) -> "_cpu.Coded":
    kind, levels, _ = kind_of(weight.levels)
    scales = (weight.scales, weight.offsets, weight.zero_points, weight.group_size)
    return (weight.codes, kind, levels, *scales, weight.order)


def stored_values(kv: KVLayer) -> Tensor | None:
    return None if kv.is_latent else kv.values


def refuse_scales(kv: KVLayer) -> None:
    if kv.k_scale is not None or kv.v_scale is not None:
        raise ValueError("k_scale, v_scale: expected none; on a CPU the scales of a cache are stored in its blocks")
