"""Writes tests/data/stored: layers that the formats' own tools made, with the matrices that the tools read from them.

Run once, by hand, with compressed-tensors 0.20, bitsandbytes 0.50 and torchao 0.18:
`python -m tests.models.stored.make_vectors`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "data/stored"
NUM_OUTPUTS, NUM_INPUTS, GROUP = 16, 128, 32


def save(name: str, tensors: dict[str, Tensor], dense: Tensor) -> None:
    layer = {f"layer.{end}": tensor.contiguous() for end, tensor in tensors.items()}
    save_file({**layer, "dense": dense.float().contiguous()}, FOLDER / f"{name}.safetensors")


def bitsandbytes_layers(weight: Tensor) -> None:
    import bitsandbytes.functional as functional

    for kind, nested in (("nf4", False), ("nf4", True), ("fp4", False)):
        packed, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=nested)
        described = {f"weight.{end}": tensor for end, tensor in state.as_dict(packed=True).items()}
        dense = functional.dequantize_4bit(packed, state)
        save(f"bnb_{kind}{'_nested' * nested}", {"weight": packed, **described}, dense)
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    save("bnb_int8", {"weight": codes, "SCB": largest}, functional.int8_vectorwise_dequant(codes, largest))


def packed_layers() -> None:
    from compressed_tensors.compressors import pack_to_int32

    for bits in (3, 4, 8):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        codes = torch.randint(low, high, (NUM_OUTPUTS, NUM_INPUTS), dtype=torch.int8)
        zeros = torch.randint(low, high, (NUM_OUTPUTS, NUM_INPUTS // GROUP), dtype=torch.int8)
        scales = torch.rand(NUM_OUTPUTS, NUM_INPUTS // GROUP).bfloat16()
        dense = (codes - zeros.repeat_interleave(GROUP, 1).float()) * scales.float().repeat_interleave(GROUP, 1)
        tensors = {
            "weight_packed": pack_to_int32(codes, bits, packed_dim=1),
            "weight_zero_point": pack_to_int32(zeros, bits, packed_dim=0),
            "weight_scale": scales,
            "weight_shape": torch.tensor([NUM_OUTPUTS, NUM_INPUTS]),
        }
        save(f"packed_{bits}", tensors, dense)


def awq_layer() -> None:
    """The tool's converter reads any words as AWQ."""
    from compressed_tensors.compressors import unpack_from_int32
    from compressed_tensors.entrypoints.convert import AutoAWQConverter

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)

    num_groups = NUM_INPUTS // GROUP
    layer: dict[str, Any] = {
        "qweight": words(NUM_INPUTS, NUM_OUTPUTS // 8),
        "qzeros": words(num_groups, NUM_OUTPUTS // 8),
        "scales": torch.rand(num_groups, NUM_OUTPUTS).half(),
    }
    read = AutoAWQConverter(4, GROUP, True, "gemm").process({f"m.{end}": value.clone() for end, value in layer.items()})
    codes = unpack_from_int32(read["m.weight_packed"], 4, torch.Size([NUM_OUTPUTS, NUM_INPUTS])).float()
    shape = torch.Size([NUM_OUTPUTS, num_groups])
    zeros = unpack_from_int32(read["m.weight_zero_point"], 4, shape, packed_dim=0).float()
    scales = read["m.weight_scale"].float()
    save("awq_gemm", layer, (codes - zeros.repeat_interleave(GROUP, 1)) * scales.repeat_interleave(GROUP, 1))


def fp8_layer() -> None:
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    weight, scales = torch.randn(136, 152).to(torch.float8_e4m3fn), torch.rand(2, 2)
    read = FP8BlockDequantizer(targets=["re:.*m"], dtype=torch.float32).process(
        {"m.weight": weight, "m.weight_scale_inv": scales}
    )
    save("fp8_block", {"weight": weight, "weight_scale_inv": scales}, read["m.weight"])


def torchao_layers() -> None:
    """As transformers saves them."""
    from torchao import quantization as torchao
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization.granularity import PerGroup

    asymmetric = torchao.quant_primitives.MappingType.ASYMMETRIC
    kinds = {
        "int8": torchao.Int8WeightOnlyConfig(version=2),
        "int4": torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP), version=2),
        "zeros": torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=PerGroup(GROUP), mapping_type=asymmetric, version=2
        ),
        "float8": torchao.Float8WeightOnlyConfig(),
    }
    for name, config in kinds.items():
        model = torch.nn.Sequential(torch.nn.Linear(NUM_INPUTS, NUM_OUTPUTS, bias=False))
        torchao.quantize_(model, config)
        tensors, _ = flatten_tensor_state_dict(model.state_dict())
        layer = {key.removeprefix("0."): tensor for key, tensor in tensors.items()}
        save(f"torchao_{name}", layer, model[0].weight.dequantize())


if __name__ == "__main__":
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    bitsandbytes_layers(torch.randn(NUM_OUTPUTS, NUM_INPUTS))
    packed_layers()
    awq_layer()
    fp8_layer()
    torchao_layers()
