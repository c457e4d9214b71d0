"""Configs of stored formats: what they say of a layer, and refusals that name file, key and what is supported."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from quire.errors import CheckpointError
from quire.quantization.stored import STORED_FORMATS, read_stored_weights

PATH = Path("config.json")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head", "re:.*router"],
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MLX = {"bits": 4, "group_size": 64, "model.embed_tokens": {"bits": 8, "group_size": 32}, "lm_head": False}


def read(values: object) -> Any:
    return read_stored_weights(PATH, {"quantization_config": values})


def torchao(name: str, **data: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_version": 2, "_data": data}}}


def group(**changes: Any) -> dict[str, Any]:
    return {**COMPRESSED, "config_groups": {"group_0": {**GROUP, "weights": {**WEIGHTS, **changes}}}}


@pytest.mark.parametrize(
    ("config", "beside", "layer", "expected"),
    [
        (GPTQ, None, "a.b", ("gptq_v1", 4, 128)),
        ({**GPTQ, "checkpoint_format": "gptq_v2", "group_size": -1}, None, "a.b", ("gptq_v2", 4, None)),
        ({**GPTQ, "dynamic": {"+:.*down": {"bits": 8}, "-:.*up": {}}}, None, "m.down_proj", ("gptq_v1", 8, 128)),
        ({**GPTQ, "dynamic": {"+:.*down": {"bits": 8}, "-:.*up": {}}}, None, "m.up_proj", None),
        (None, {"bits": 3, "group_size": 32}, "a.b", ("gptq_v1", 3, 32)),
        (None, {"w_bit": 4, "q_group_size": 64}, "a.b", ("awq_gemm", 4, 64)),
        ({**AWQ, "version": "GEMV"}, None, "a.b", ("awq_gemv", 4, 128)),
        ({**AWQ, "version": None, "checkpoint_format": "gemm"}, None, "a.b", ("awq_gemm", 4, 128)),
        (COMPRESSED, None, "a.q_proj", ("packed_int32", 4, 128)),
        (COMPRESSED, None, "lm_head", None),
        (COMPRESSED, None, "a.router", None),
        (FP8, None, "a.b", ("fp8", 8, None)),
        (BNB, None, "a.b", ("bnb_4bit", 4, 64)),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, None, "a.b", ("bnb_8bit", 8, None)),
        (torchao("FqnToConfig", fqn_to_config={"a": None}), None, "a.b", ("torchao", 8, None)),
    ],
    ids=str,
)
def test_the_scheme_of_a_layer(config: Any, beside: Any, layer: str, expected: Any) -> None:
    stored = read_stored_weights(PATH, {} if config is None else {"quantization_config": config}, beside)
    assert stored is not None
    scheme = stored.scheme_of(layer)
    assert (scheme and (scheme.layout, scheme.bits, scheme.group_size)) == expected


def test_groups_of_several_precisions() -> None:
    four = {**GROUP, "format": "pack-quantized"}
    eight = {**four, "targets": ["re:.*down_proj", "model.x"], "weights": {**WEIGHTS, "num_bits": 8}}
    stored = read({**COMPRESSED, "format": "mixed-precision", "config_groups": {"group_0": four, "group_1": eight}})
    found = {name: stored.scheme_of(name).bits for name in ("m.down_proj", "model.x", "model.xy", "m.up_proj")}
    assert found == {"m.down_proj": 8, "model.x": 8, "model.xy": 4, "m.up_proj": 4}
    assert stored.describe() == "compressed-tensors, 4 and 8 bits"


def test_mlx_names_layers_of_their_own() -> None:
    stored = read_stored_weights(PATH, {"quantization": MLX, "quantization_config": MLX})
    assert stored is not None
    schemes = [stored.scheme_of(name) for name in ("model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj")]
    assert [scheme and scheme.bits for scheme in schemes] == [8, None, 4]


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "mxfp4"}}, {"quantization": {}}])
def test_floats_and_what_a_family_reads_itself(config: dict[str, Any]) -> None:
    assert read_stored_weights(PATH, config) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "quanto"}, 'quantization_config is "quanto"; supported: floats, gptq, awq, compressed-t'),
        (torchao("Int4WeightOnlyConfig"), '_type is "Int4WeightOnlyConfig"; supported: Int8WeightOnlyConfig, Int8Dyn'),
        (torchao("FqnToConfig", fqn_to_config={"a": {"_type": "UIntXWeightOnlyConfig"}}), "fqn_to_config.a._type is"),
        (torchao("IntxWeightOnlyConfig", intx_packing_format={"_data": "OPAQUE"}), "supported: UNPACKED_TO_INT8"),
        (torchao("IntxWeightOnlyConfig", mapping_type={"_data": 3}), "mapping_type._data is 3; supported: SYMMETRIC"),
        ({"quant_method": "torchao"}, "quantization_config.quant_type is missing; supported: an object"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, 'quant_type is "int4_weight_only"; supported'),
        ({"quant_method": "torchao", "quant_type": {}}, "quant_type is {}; supported: an object with a config: Int8"),
        ({"bits": 4}, "quantization_config.quant_method is missing; supported: floats, gptq"),
        ({"quant_method": None}, "quantization_config.quant_method is missing; supported: floats, gptq"),
        ({"quant_method": ["gptq"]}, 'quantization_config.quant_method is ["gptq"]; supported'),
        ("gptq", 'quantization_config is "gptq"; supported: an object'),
        ({**GPTQ, "bits": 5}, "quantization_config.bits is 5; supported: 2, 3, 4, 8"),
        ({**GPTQ, "bits": True}, "quantization_config.bits is true; supported: 2, 3, 4, 8"),
        ({**GPTQ, "bits": 4.0}, "quantization_config.bits is 4.0; supported: 2, 3, 4, 8"),
        ({**GPTQ, "bits": None}, "quantization_config.bits is missing; supported"),
        ({**GPTQ, "group_size": -3}, "group_size is -3; supported: -1 for all inputs, or a multiple of 8 from 8 on"),
        ({**GPTQ, "group_size": 0}, "group_size is 0; supported"),
        ({**GPTQ, "group_size": 12}, "group_size is 12; supported"),
        ({**GPTQ, "group_size": 2**60}, "group_size is 1152921504606846976; supported"),
        ({**GPTQ, "group_size": "128"}, 'group_size is "128"; supported'),
        ({**GPTQ, "sym": "yes"}, 'sym is "yes"; supported: true or false'),
        ({**GPTQ, "checkpoint_format": "marlin"}, 'checkpoint_format is "marlin"; supported: gptq, gptq_v2'),
        ({**GPTQ, "pack_dtype": "int16"}, 'pack_dtype is "int16"; supported: int32'),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format is true; supported: false"),
        ({**GPTQ, "dynamic": {"+:(a+)+b": {"bits": 8}}}, 'has the pattern "(a+)+b"; supported: regular expressions'),
        ({**GPTQ, "dynamic": {"+:(": {"bits": 8}}}, 'has the pattern "("; supported'),
        ({**GPTQ, "dynamic": {"+:" + "a" * 600: {}}}, "of up to 500 characters"),
        ({**GPTQ, "dynamic": {"+:.*.*.*.*.*.*x": {}}}, "with up to 5 repeats"),
        ({**GPTQ, "dynamic": {"a": 3}}, "quantization_config.dynamic.a is 3; supported: an object"),
        ({**AWQ, "bits": 8}, "quantization_config.bits is 8; supported: 4"),
        ({**AWQ, "version": "gemv_fast"}, 'version is "gemv_fast"; supported: gemm, gemv'),
        ({**AWQ, "version": 3}, "version is 3; supported: gemm, gemv"),
        ({**COMPRESSED, "format": "marlin-24"}, 'format is "marlin-24"; supported: pack-quantized'),
        ({**COMPRESSED, "config_groups": {}}, "config_groups is {}; supported: at least one group"),
        ({**COMPRESSED, "config_groups": [1]}, "config_groups is [1]; supported: an object"),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, 'format is "sparse-24-bitmask"; suppor'),
        ({**COMPRESSED, "ignore": "lm_head"}, 'ignore is "lm_head"; supported: a list of texts'),
        ({**COMPRESSED, "ignore": ["re:(x*)*"]}, 'ignore has the pattern "(x*)*"'),
        (group(num_bits=9), "config_groups.group_0.weights.num_bits is 9; supported: 2, 3, 4, 5, 6, 7, 8"),
        (group(type="float"), 'weights.type is "float"; supported: int'),
        (group(strategy="token"), 'weights.strategy is "token"; supported: tensor, channel, group, block'),
        (group(dynamic=True), "weights.dynamic is true; supported: false"),
        (group(strategy="block", block_structure=[0, 8]), "block_structure is [0, 8]; supported: two sizes"),
        ({**FP8, "fmt": "e5m2"}, 'fmt is "e5m2"; supported: e4m3'),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size is [128]; supported: two sizes"),
        ({**FP8, "weight_block_size": [-128, 128]}, "weight_block_size is [-128, 128]; supported"),
        ({**BNB, "load_in_8bit": True}, "load_in_4bit is true; supported: one of load_in_4bit and load_in_8bit"),
        ({**BNB, "bnb_4bit_quant_type": "int4"}, 'bnb_4bit_quant_type is "int4"; supported: nf4, fp4'),
        ({**BNB, "bnb_4bit_quant_storage": "bfloat16"}, 'bnb_4bit_quant_storage is "bfloat16"; supported: uint8'),
    ],
    ids=str,
)
def test_refusals(config: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read(config)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("config.json: ")
    assert len(str(refusal.value)) < 600
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("bits", "mode"), [(3, "affine"), (4, "mxfp4")])
def test_refusals_of_mlx(bits: int, mode: str) -> None:
    with pytest.raises(CheckpointError, match=r"quantization\.(bits|mode) is .*; supported: "):
        read_stored_weights(PATH, {"quantization": {"bits": bits, "group_size": 64, "mode": mode}})


ODD = [None, True, -1, 0, 3, 2**70, 1.5, float("nan"), "", "x" * 5000, [], [[]], {}, {"a": {}}, ["re:("]]


TORCHAO = torchao("ModuleFqnToConfig", module_fqn_to_config={"a": {"_type": "IntxWeightOnlyConfig", "_data": {}}})
CONFIGS = (GPTQ, AWQ, COMPRESSED, FP8, BNB, TORCHAO)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["quant_method"])
def test_any_config_is_read_or_refused(config: dict[str, Any]) -> None:
    """Values of other types anywhere end in a scheme or a refusal of one line."""
    chooser = random.Random(0)
    for _ in range(300):
        changed = json.loads(json.dumps(config))
        target = changed
        while True:
            key = chooser.choice([*target, "unknown"])
            inner = target.get(key)
            if isinstance(inner, dict) and inner and chooser.random() < 0.7:
                target = inner
                continue
            target[key] = chooser.choice(ODD)
            break
        with contextlib.suppress(CheckpointError):
            stored = read(changed)
            assert stored is None or stored.rules


def test_every_format_has_a_case() -> None:
    assert {config["quant_method"] for config in CONFIGS} == set(STORED_FORMATS)
