"""Layers that the formats' own tools wrote are read as the tools read them (see `make_vectors.py`)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire.kernels.coded import CodedMatrix
from quire.models.safetensors_file import read_header
from quire.models.safetensors_weights import SafetensorsWeights
from quire.models.stored.layers import StoredLayers
from quire.quantization.stored import read_stored_weights
from tests.models.stored.packers import awq_config, compressed, torchao_config

FOLDER = Path(__file__).parents[2] / "data/stored"
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def packed(bits: int) -> dict[str, Any]:
    return compressed("pack-quantized", {"num_bits": bits, "type": "int", "symmetric": False, "group_size": 32})


VECTORS: dict[str, dict[str, Any]] = {
    "bnb_nf4": {"quantization_config": {**BNB, "bnb_4bit_quant_type": "nf4"}},
    "bnb_nf4_nested": {"quantization_config": {**BNB, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}},
    "bnb_fp4": {"quantization_config": {**BNB, "bnb_4bit_quant_type": "fp4"}},
    "bnb_int8": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "packed_3": packed(3),
    "packed_4": packed(4),
    "packed_8": packed(8),
    "awq_gemm": awq_config(version="gemm"),
    "torchao_int8": torchao_config("Int8WeightOnlyConfig"),
    "torchao_int4": torchao_config("IntxWeightOnlyConfig"),
    "torchao_zeros": torchao_config("IntxWeightOnlyConfig", mapping_type={"_data": "ASYMMETRIC"}),
    "torchao_float8": torchao_config("Float8WeightOnlyConfig"),
    "fp8_block": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
}


def test_every_vector_is_read() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(VECTORS)


@pytest.mark.parametrize("name", VECTORS)
def test_a_layer_of_the_tool(name: str) -> None:
    files = SafetensorsWeights(FOLDER, read_header(FOLDER / f"{name}.safetensors")[0])
    stored = read_stored_weights(FOLDER / "config.json", VECTORS[name])
    assert stored is not None
    rows, columns = files.shape_of("dense")
    expected = files.take("dense", (rows, columns))
    source = StoredLayers(files, stored)
    matrix = source.take_linear("layer", (rows, columns), bias=False, transposed=False).weight
    assert isinstance(matrix, CodedMatrix)
    torch.testing.assert_close(matrix.dequantize(), expected, rtol=1e-6, atol=1e-6)
    source.finish()
