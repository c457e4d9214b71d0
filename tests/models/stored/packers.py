"""Packers: a float checkpoint becomes one of a format of few bits, beside the floats that its bits stand for.

They are written from the formats' published layouts, one bit after the other, and share nothing with the readers;
`test_vectors.py` holds readers against bytes that the formats' own tools wrote.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import make_checkpoint

Tensors = dict[str, Tensor]
Pack = Callable[[Tensor], tuple[Tensors, Tensor]]
"""A matrix [N, K] -> the tensors of a layer by the ends of their names, and the matrix that they stand for."""


def to_words(codes: Tensor, bits: int) -> Tensor:
    """codes [R, C] -> a stream of bits [R, W] int32, low bits first."""
    stream = (codes.long()[..., None] >> torch.arange(bits) & 1).flatten(1)
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32)).view(len(codes), -1, 32)
    words = (padded << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def integers(
    weight: Tensor, bits: int, group_size: int, *, symmetric: bool, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """codes [N, K], scales and zero points [N, G], by rounding to the nearest."""
    codes, scales, zeros, most = [], [], [], 2**bits - 1
    for group in weight.float().split(group_size, dim=1):
        if symmetric:
            zero = torch.full((len(group), 1), 2.0 ** (bits - 1))
            scale = group.abs().amax(1, keepdim=True) / (2.0 ** (bits - 1) - 0.5)
        else:
            low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / most
            zero = (-low / scale).round().clamp(0, most)
        scale = scale.to(dtype).float()
        codes.append((group / scale + zero).round().clamp(0, most))
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(codes, 1).long(), torch.cat(scales, 1).to(dtype), torch.cat(zeros, 1).long()


def spread(groups: Tensor, group_size: int, num_inputs: int) -> Tensor:
    return groups.repeat_interleave(group_size, 1)[:, :num_inputs]


def value(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    num_inputs = codes.shape[1]
    return (codes - spread(zeros, group_size, num_inputs)) * spread(scales.float(), group_size, num_inputs)


def gptq(bits: int, group_size: int, *, symmetric: bool = True, version: int = 1, shuffled: bool = False) -> Pack:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        num_outputs, num_inputs = weight.shape
        group = num_inputs if group_size == -1 else group_size
        generator = torch.Generator().manual_seed(num_inputs)
        order = torch.randperm(num_inputs, generator=generator) if shuffled else torch.arange(num_inputs)
        codes, scales, zeros = integers(weight[:, order], bits, group, symmetric=symmetric)
        dense = torch.empty(num_outputs, num_inputs)
        dense[:, order] = value(codes, scales, zeros, group)
        groups, stored = torch.empty(num_inputs, dtype=torch.int32), torch.empty_like(codes)
        groups[order], stored[:, order] = (torch.arange(num_inputs) // group).int(), codes
        fields = (zeros - 1) % 2**bits if version == 1 else zeros
        return {
            "qweight": to_words(stored, bits).t(),
            "qzeros": to_words(fields.t(), bits),
            "scales": scales.t(),
            "g_idx": groups,
        }, dense

    return pack


def awq(group_size: int, version: str) -> Pack:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scales, zeros = integers(weight, 4, group_size, symmetric=False)
        dense = value(codes, scales, zeros, group_size)
        if version == "gemv":
            width = -(-scales.shape[1] // 8)
            room = 8 * width - scales.shape[1]
            padded = torch.nn.functional.pad(scales, (0, room))
            return {"qweight": to_words(codes, 4), "qzeros": to_words(zeros, 4), "scales": padded}, dense
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

        def outputs(x: Tensor) -> Tensor:
            return to_words(x.t().reshape(x.shape[1], -1, 8)[..., order].flatten(1), 4)

        return {"qweight": outputs(codes), "qzeros": outputs(zeros), "scales": scales.t()}, dense

    return pack


def packed(bits: int, group_size: int | None, *, symmetric: bool = True, by_activation: bool = False) -> Pack:
    """compressed-tensors' pack-quantized."""

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        num_outputs, num_inputs = weight.shape
        group = group_size or num_inputs
        order = torch.arange(num_inputs - 1, -1, -1) if by_activation else torch.arange(num_inputs)
        codes, scales, zeros = integers(weight[:, order], bits, group, symmetric=symmetric, dtype=torch.bfloat16)
        dense, stored = torch.empty(num_outputs, num_inputs), torch.empty_like(codes)
        dense[:, order], stored[:, order] = value(codes, scales, zeros, group), codes
        tensors = {
            "weight_packed": to_words(stored, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([num_outputs, num_inputs]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = to_words(zeros.t(), bits).t()
        if by_activation:
            groups = torch.empty(num_inputs, dtype=torch.int32)
            groups[order] = (torch.arange(num_inputs) // group).int()
            tensors["weight_g_idx"] = groups
        return tensors, dense

    return pack


def bytes_by_output(scale_end: str, divisor: float = 1.0, *, with_input_scale: bool = False) -> Pack:
    """Signed bytes with a scale for each output."""

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        scales = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scales).round().to(torch.int8)
        stored = (scales * divisor).flatten() if divisor != 1 else scales
        extra = {"input_scale": torch.ones(1)} if with_input_scale else {}
        return {"weight": codes, scale_end: stored, **extra}, codes.float() * scales

    return pack


def float8(extent: str, scale_end: str = "weight_scale", block: tuple[int, int] = (32, 32)) -> Pack:
    """Floats of 8 bits; `extent` of a scale: tensor, channel or block."""

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        num_outputs, num_inputs = weight.shape
        rows, columns = {"tensor": weight.shape, "channel": (1, num_inputs), "block": block}[extent]
        shape = (-(-num_outputs // rows), -(-num_inputs // columns))
        scales = torch.empty(shape)
        for i in range(shape[0]):
            for j in range(shape[1]):
                tile = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                scales[i, j] = tile.abs().max() / 448
        full = scales.repeat_interleave(rows, 0)[:num_outputs].repeat_interleave(columns, 1)[:, :num_inputs]
        codes = (weight / full).to(torch.float8_e4m3fn)
        return {"weight": codes, scale_end: scales.reshape(()) if extent == "tensor" else scales}, codes.float() * full

    return pack


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _four_bit_floats(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes and their numbers."""
    index = (x.abs()[..., None] - E2M1).abs().argmin(-1)
    return index + 8 * (x < 0), E2M1[index] * torch.where(x < 0, -1.0, 1.0)


def four_bit_floats(kind: str) -> Pack:
    """nvfp4 with a number for the tensor, or mxfp4 with powers of two."""
    group = 16 if kind == "nvfp4" else 32

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        num_inputs = weight.shape[1]
        largest = torch.stack([each.abs().amax(1) for each in weight.split(group, 1)], 1).clamp(min=1e-6)
        if kind == "nvfp4":
            whole = torch.tensor([448 * 6.0]) / weight.abs().max()
            stored = (largest / 6 * whole).to(torch.float8_e4m3fn)
            scales, extra = stored.float() / whole, {"weight_global_scale": whole}
        else:
            exponents = (largest / 6).log2().ceil().clamp(-100, 100)
            stored, scales, extra = (exponents + 127).to(torch.uint8), torch.exp2(exponents), {}
        full = spread(scales, group, num_inputs)
        codes, numbers = _four_bit_floats(weight / full)
        pairs = codes.view(len(codes), -1, 2)
        packed_codes = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
        return {"weight_packed": packed_codes, "weight_scale": stored, **extra}, numbers * full

    return pack


def mxfp8(weight: Tensor) -> tuple[Tensors, Tensor]:
    largest = torch.stack([each.abs().amax(1) for each in weight.split(32, 1)], 1)
    exponents = (largest / 448).log2().ceil()
    full = spread(torch.exp2(exponents), 32, weight.shape[1])
    codes = (weight / full).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": (exponents + 127).to(torch.uint8)}, codes.float() * full


_NF4 = "-1 -.6961928 -.5250731 -.3949175 -.2844414 -.1847734 -.0910500 0 .0795803 .1609302 .2461123 .3379152 .4407098"
NF4 = torch.tensor([*map(float, _NF4.split()), 0.5626170, 0.7229568, 1.0])


def bnb(nested: bool, block: int = 64) -> Pack:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        flat = weight.flatten()
        blocks = flat.split(block)
        largest = torch.stack([each.abs().max() for each in blocks])
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": [*weight.shape]}
        tensors: Tensors = {}
        if nested:
            levels = torch.linspace(-1, 1, 256)
            offset = largest.mean().item()
            outer = torch.stack([each.abs().max() for each in (largest - offset).split(256)])
            inner = ((largest - offset) / outer.repeat_interleave(256)[: len(largest)])[:, None] - levels
            stored = inner.abs().argmin(1).to(torch.uint8)
            largest = levels[stored.int()] * outer.repeat_interleave(256)[: len(largest)] + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            tensors = {"weight.nested_absmax": outer, "weight.nested_quant_map": levels, "weight.absmax": stored}
        full = largest.repeat_interleave(block)[: len(flat)]
        codes = ((flat / full)[:, None] - NF4).abs().argmin(1)
        halves = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
        return {
            "weight.absmax": largest,
            **tensors,
            "weight": (halves[:, 0] << 4 | halves[:, 1]).to(torch.uint8)[:, None],
            "weight.quant_map": NF4.clone(),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }, (NF4[codes] * full).view_as(weight)

    return pack


def mlx(bits: int, group_size: int) -> Pack:
    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scales, zeros = integers(weight, bits, group_size, symmetric=False, dtype=torch.float32)
        biases = -zeros * scales
        full = (spread(each, group_size, weight.shape[1]) for each in (scales, biases))
        scale, bias = full
        words = to_words(codes, bits).view(torch.uint32)
        return {"weight": words, "scales": scales, "biases": biases}, codes * scale + bias

    return pack


def torchao(group_size: int | None, *, bits: int = 8, symmetric: bool = True) -> Pack:
    """Codes of any width take a byte, zero points are of signed codes."""

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        group = group_size or weight.shape[1]
        codes, scales, zeros = integers(weight, bits, group, symmetric=symmetric, dtype=torch.bfloat16)
        middle = 2 ** (bits - 1)
        return {
            "_weight_qdata": (codes - middle).to(torch.int8),
            "_weight_scale": scales,
            "_weight_zero_point": (zeros - middle).to(torch.int8),
        }, value(codes, scales, zeros, group)

    return pack


@dataclass(frozen=True)
class Case:
    """A format: what config.json says, and how a layer is packed."""

    config: dict[str, Any]
    pack: Pack
    floats: Sequence[str] = ("lm_head", "embed_tokens")
    """Layers that stay in floats."""
    transposed: Sequence[str] = ()
    """Layers whose floats lie as [inputs, outputs]."""


def compressed(form: str, weights: dict[str, Any], **extra: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": extra.pop("input_activations", None)}
    values = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return {"quantization_config": {**values, "ignore": ["lm_head"], "quantization_status": "compressed", **extra}}


def gptq_config(bits: int, group_size: int, **extra: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": group_size, **extra}}


def awq_config(**extra: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, **extra}}


def torchao_config(name: str, **data: Any) -> dict[str, Any]:
    kind = {"default": {"_type": name, "_version": 2, "_data": data}}
    return {"quantization_config": {"quant_method": "torchao", "quant_type": kind, "modules_to_not_convert": None}}


_INT = {"type": "int", "symmetric": True}
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
_FOUR_BITS = {"num_bits": 4, "type": "float", "symmetric": True}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}

CASES: dict[str, Case] = {
    "gptq 4": Case(gptq_config(4, 32, desc_act=False, sym=True), gptq(4, 32)),
    "gptq 4 asymmetric": Case(gptq_config(4, 16, sym=False), gptq(4, 16, symmetric=False)),
    "gptq 4 v2, shuffled": Case(
        gptq_config(4, 32, sym=False, desc_act=True, checkpoint_format="gptq_v2"),
        gptq(4, 32, symmetric=False, version=2, shuffled=True),
    ),
    "gptq 3": Case(gptq_config(3, 32), gptq(3, 32)),
    "gptq 2, one group": Case(gptq_config(2, -1, sym=False), gptq(2, -1, symmetric=False)),
    "gptq 8, head too": Case(gptq_config(8, 32, lm_head=True), gptq(8, 32), floats=("embed_tokens",)),
    "gptq 8 asymmetric": Case(gptq_config(8, 32, sym=False), gptq(8, 32, symmetric=False)),
    "awq gemm": Case(awq_config(version="GEMM"), awq(32, "gemm")),
    "awq gemv": Case(awq_config(version="gemv"), awq(32, "gemv")),
    "W4A16": Case(
        compressed("pack-quantized", {**_INT, "num_bits": 4, "strategy": "group", "group_size": 32}), packed(4, 32)
    ),
    "W4A16 asymmetric": Case(
        compressed(
            "pack-quantized", {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
        ),
        packed(4, 16, symmetric=False),
    ),
    "W4A16 by activation": Case(
        compressed(
            "pack-quantized",
            {**_INT, "num_bits": 4, "strategy": "group", "group_size": 16, "actorder": "group"},
        ),
        packed(4, 16, by_activation=True),
    ),
    "W8A16": Case(compressed("pack-quantized", {**_INT, "num_bits": 8, "strategy": "channel"}), packed(8, None)),
    "W6A16": Case(compressed("pack-quantized", {**_INT, "num_bits": 6, "strategy": "channel"}), packed(6, None)),
    "W8A8": Case(
        compressed("int-quantized", {**_INT, "num_bits": 8, "strategy": "channel"}, input_activations=_DYNAMIC),
        bytes_by_output("weight_scale"),
    ),
    "FP8 tensor, static": Case(compressed("float-quantized", {**_FLOAT8, "strategy": "tensor"}), float8("tensor")),
    "FP8 channel": Case(compressed("float-quantized", {**_FLOAT8, "strategy": "channel"}), float8("channel")),
    "FP8 block": Case(
        compressed("float-quantized", {**_FLOAT8, "strategy": "block", "block_structure": [32, 32]}), float8("block")
    ),
    "MXFP8": Case(compressed("mxfp8-quantized", {**_FLOAT8, "strategy": "group", "group_size": 32}), mxfp8),
    "NVFP4": Case(
        compressed("nvfp4-pack-quantized", {**_FOUR_BITS, "strategy": "tensor_group", "group_size": 16}),
        four_bit_floats("nvfp4"),
    ),
    "MXFP4": Case(
        compressed("mxfp4-pack-quantized", {**_FOUR_BITS, "strategy": "group", "group_size": 32}),
        four_bit_floats("mxfp4"),
    ),
    "fp8 of DeepSeek": Case(
        {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 32]}},
        float8("block", "weight_scale_inv", (48, 32)),
    ),
    "fp8 tensor": Case({"quantization_config": {"quant_method": "fp8"}}, float8("tensor")),
    "bnb nf4": Case({"quantization_config": _BNB}, bnb(False)),
    "bnb nf4 nested": Case({"quantization_config": {**_BNB, "bnb_4bit_use_double_quant": True}}, bnb(True)),
    "bnb int8": Case(
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, bytes_by_output("SCB", 127.0)
    ),
    "torchao int8": Case(torchao_config("Int8WeightOnlyConfig"), torchao(None)),
    "torchao int4, groups": Case(torchao_config("IntxWeightOnlyConfig"), torchao(32, bits=4)),
    "torchao int8 asymmetric": Case(
        torchao_config("Int8DynamicActivationIntxWeightConfig", weight_mapping_type={"_data": "ASYMMETRIC"}),
        torchao(16, symmetric=False),
    ),
    "mlx 4": Case({"quantization": {"bits": 4, "group_size": 32}}, mlx(4, 32), floats=()),
    "mlx 8": Case({"quantization": {"bits": 8, "group_size": 16}}, mlx(8, 16)),
}


def pack_checkpoint(source: Path, target: Path, case: Case) -> Path:
    """Write the checkpoint of `source` in a format to `target`/stored, and the floats it stands for to
    `target`/floats; returns the first."""
    stored: Tensors = {}
    floats: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer, _, end = name.rpartition(".")
        if end == "weight" and tensor.dim() == 2 and not any(kept in layer for kept in case.floats):
            flips = any(part in layer for part in case.transposed)
            tensors, dense = case.pack(tensor.float().t() if flips else tensor.float())
            floats[name] = dense.t().contiguous() if flips else dense
            stored |= {f"{layer}.{key}": value.contiguous() for key, value in tensors.items()}
        else:
            stored[name] = floats[name] = tensor
    config = json.loads((source / "config.json").read_text())
    for folder, tensors, extra in (("floats", floats, {}), ("stored", stored, case.config)):
        (target / folder).mkdir(parents=True)
        (target / folder / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(tensors, target / folder / "model.safetensors", {"format": "pt"})
    return target / "stored"


def make_stored(target: Path, case: Case, family: str = "llama", **changes: Any) -> Path:
    """A small checkpoint of a family in a format, and beside it `floats`."""
    return pack_checkpoint(make_checkpoint(target / "source", family, **changes), target, case)
