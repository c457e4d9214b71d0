"""gpt-oss: sinks, windows in turns, yarn, biases of everything, a clamped gate, and MXFP4 experts."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quire import LLM, SamplingParams
from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.kernels.block_matrix import BlockWeight
from quire.kernels.interface import Mxfp4Matrix
from quire.kernels.mxfp4 import dequantize
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.random_weights import RandomWeights
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint, reference_model
from tests.model_config.test_published import PUBLISHED
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel

EXPERTS = ("gate_up_proj", "down_proj")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention_bias": False, "num_key_value_heads": 1, "head_dim": 20, "tie_word_embeddings": True},
        {"sliding_window": 7, "num_experts_per_tok": 1},
        {"layer_types": ["full_attention"] * 3 + ["sliding_attention"], "num_local_experts": 3},
        {"hidden_size": 60, "intermediate_size": 36, "num_key_value_heads": 4, "num_attention_heads": 8},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gpt-oss", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "gpt-oss"), kernels=reference, block_size=8)


@pytest.mark.parametrize("option", ["sinks", "swiglu_limit", "gate_up_proj_bias", "down_proj_bias"])
def test_the_test_checkpoints_show_what_an_option_does(option: str, tmp_path: Path) -> None:
    """Else the tests above could not fail for it."""
    folder = make_checkpoint(tmp_path, "gpt-oss")
    before = expected_logits(folder, ids := prompt(40))
    if option.startswith("swiglu"):
        change_config(folder, **{option: 30.0})
    else:
        change_tensors(folder, option, torch.zeros_like)
    assert (before - expected_logits(folder, ids)).abs().max() > 1e-2


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, ending: str, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: change(x) if name.endswith(ending) else x for name, x in tensors.items()}, file)


def test_what_published_files_leave_unsaid(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt-oss", sliding_window=128, head_dim=64, num_key_value_heads=2)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("layer_types", "rope_parameters", "attention_bias", "sliding_window"):
        del config[key]
    path.write_text(json.dumps(config))
    read = ModelConfig.from_folder(folder)
    theirs = reference_model(folder).config
    assert read.layer_windows == (128, 0, 128, 0)
    assert theirs.layer_types == ["sliding_attention", "full_attention"] * 2
    assert read.rope is not None
    for key in ("factor", "beta_fast", "beta_slow", "truncate", "rope_theta", "rope_type"):
        assert getattr(read.rope, key.replace("rope_theta", "theta")) == theirs.rope_parameters[key]
    assert read.rope.original_max_position == 4096


def test_the_published_model_is_planned(tmp_path: Path) -> None:
    """gpt-oss-20b: 12.8 GiB as it is published, a token passes 4.2 billion parameters, the embedding included."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gpt-oss-20b"]))
    config = ModelConfig.from_folder(tmp_path)
    spec = config.spec
    assert (round(spec.num_parameters / 1e9, 1), round(spec.num_active_parameters / 1e9, 1)) == (20.9, 4.2)
    assert round(spec.weight_bytes("bfloat16") / 2**30, 1) == 12.8
    assert config.layer_windows == (128, 0) * 12
    assert config.context_length == 131072


# -- MXFP4 ------------------------------------------------------------------------------------------------------------


def random_mxfp4(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Blocks and scales of numbers of the size that weights have; shape [..., outputs, inputs]."""
    generator = torch.Generator().manual_seed(seed)
    *rows, inputs = shape
    blocks = torch.randint(0, 256, (*rows, inputs // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(121, 125, (*rows, inputs // 32), generator=generator, dtype=torch.uint8)


def test_unpacking_equals_transformers() -> None:
    blocks, scales = random_mxfp4(2, 6, 96)
    blocks.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    scales.view(-1)[:6] = torch.tensor([0, 1, 127, 128, 200, 254], dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    found = torch.stack([dequantize(Mxfp4Matrix(*pair)) for pair in zip(blocks, scales, strict=True)])
    assert torch.equal(found, expected)


def pack_experts(folder: Path) -> Path:
    """Store the experts as MXFP4, and beside the folder the same numbers as floats; returns that folder."""
    file = folder / "model.safetensors"
    floats = load_file(file)
    packed = dict(floats)
    for seed, name in enumerate(sorted(name for name in floats if name.endswith(EXPERTS))):
        num_experts, num_inputs, num_outputs = floats[name].shape
        blocks, scales = random_mxfp4(num_experts, num_outputs, num_inputs, seed=seed)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    twin = folder.with_name(f"{folder.name}-floats")
    twin.mkdir()
    for path in folder.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    save_file(floats, twin / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, file)
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return twin


def test_packed_experts_keep_their_bits(tmp_path: Path) -> None:
    """Their numbers are exact, and the rows that meet them have 15 bits; the plan counts 17 bytes for 32 numbers."""
    folder = make_checkpoint(tmp_path / "packed", "gpt-oss", intermediate_size=64)
    floats = pack_experts(folder)
    ids = prompt(50)
    model = PagedModel(folder)
    experts = model.model.layers[0].mlp.experts  # type: ignore[attr-defined]
    assert isinstance(experts.packed.gate_up, BlockWeight)
    assert_close(model.step({0: ids})[0], expected_logits(floats, ids), 1e-3)
    numbers = 4 * 6 * 3 * 64 * 64
    of_floats, packed = (ModelConfig.from_folder(each).spec for each in (floats, folder))
    assert of_floats.num_parameters == packed.num_parameters
    assert of_floats.weight_bytes("float32") - packed.weight_bytes("float32") == numbers * 4 - numbers * 17 // 32


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_packed_experts_beside_other_layers(dtype: str, tmp_path: Path) -> None:
    """Other layers are stored as asked; with few bits the experts' inputs are rounded to 8 bits as well. The reference
    says what that gives: against transformers a rounded router may choose another expert."""
    folder = make_checkpoint(tmp_path / "packed", "gpt-oss", intermediate_size=64)
    pack_experts(folder)
    ids = prompt(50)
    fast = PagedModel(folder, dtype).step({0: ids})[0]
    slow = PagedModel(folder, dtype, kernels=reference).step({0: ids})[0]
    # Where two scales, or two numbers of digits, are nearly as good as each other, the kernels may take the other one.
    assert (fast - slow).norm() < 6e-2 * slow.norm()


def test_kernels_without_mxfp4_unpack_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_checkpoint(tmp_path / "packed", "gpt-oss", intermediate_size=64)
    expected = expected_logits(pack_experts(folder), ids := prompt(20))
    with caplog.at_level(logging.WARNING), LLM(str(folder), attention_backend="sdpa", dtype="float32") as llm:
        assert "do not multiply MXFP4: experts are unpacked and stored as float32" in caplog.text
        assert llm.memory_plan.weights == ModelConfig.from_folder(folder).spec.weight_bytes("float32") + (
            4 * 6 * 3 * 64 * 64 * 4 - 4 * 6 * 3 * 64 * 64 * 17 // 32
        )
        output = llm.generate([ids], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))[0]
    assert output.outputs[0].token_ids == [int(expected[-1].argmax())]


def test_random_weights_are_packed_too(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "packed", "gpt-oss", intermediate_size=64)
    pack_experts(folder)
    model = load_model(ModelConfig.from_folder(folder), RandomWeights(), kernels_for("cpu"), "float32")
    assert isinstance(model.layers[0].mlp.experts.packed.down, BlockWeight)  # type: ignore[attr-defined]


# -- what is refused --------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.sinks",
        "self_attn.o_proj.bias",
        "mlp.router.bias",
        "mlp.experts.down_proj",
        "mlp.experts.down_proj_bias",
    ],
)
def test_tensors_that_are_missing(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt-oss")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.{name}"]
    save_file(tensors, file)
    assert f"tensor model.layers.1.{name} of shape" in refusal(folder)


def test_packed_experts_that_are_damaged(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "packed", "gpt-oss", intermediate_size=64)
    pack_experts(folder)
    good = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    for stored, message in (
        (good[name].float(), f"tensor {name} is of dtype F32; supported: U8"),
        (good[name][:, :-1].clone(), f"tensor {name} has shape [6, 63, 2], expected [6, 64, 2] by config.json"),
        (None, f"tensor {name} of shape [6, 64, 2] is missing"),
    ):
        tensors = {**good, name: stored}
        save_file({key: value for key, value in tensors.items() if value is not None}, folder / "model.safetensors")
        assert message in refusal(folder)


def test_packed_experts_whose_width_is_no_multiple_of_a_block(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt-oss")  # experts are 48 wide
    tensors = load_file(folder / "model.safetensors")
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = random_mxfp4(6, 96, 64)
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    assert "experts.down_proj_blocks: MXFP4 has blocks of 32 numbers, and an expert's input of 48" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7; supported: at most the number of experts 6"),
        ({"swiglu_limit": 5}, "swiglu_limit is 5; supported: 7.0"),
        ({"layer_types": ["x"] * 4}, 'layer_types is ["x", "x", "x", "x"]; supported: 4 times one of full_attention'),
        ({"quantization_config": {"quant_method": "quanto"}}, 'quantization_config is "quanto"; supported: floats'),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt-oss")
    change_config(folder, **change)
    assert message in refusal(folder)
