"""Checkpoints of few bits compute what transformers computes from the floats that their bits stand for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.config import EngineConfig
from quire.engine.checkpoint import read_model_config
from quire.engine.memory_plan import plan_memory
from quire.errors import CheckpointError, ConfigError
from quire.kernels import kernels_for
from quire.kernels.coded import CodedWeight
from quire.layers.linear import Linear, SideBySide
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.device_weights import DeviceWeights
from quire.models.experts import Experts
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint
from tests.models.parity import TOLERANCE, assert_close, expected_logits, prompt
from tests.models.stored.packers import CASES, make_stored, pack_checkpoint
from tests.paged_model import PagedModel


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=1, intermediate_size=128)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str, llama: Path, tmp_path: Path) -> None:
    folder = pack_checkpoint(llama, tmp_path, CASES[name])
    ids = prompt(20)
    model = PagedModel(folder)
    found = torch.cat([model.step({0: ids[:13]})[0], model.step({0: ids[13:]})[0]])
    assert_close(found, expected_logits(tmp_path / "floats", ids))
    assert (expected_logits(llama, ids) - found).abs().max() > TOLERANCE  # the bits are few
    assert read_model_config(folder).spec.layer_bytes("float32") == sum(map(kept_bytes, layers_of(model)))


def test_blocks_that_go_over_the_ends_of_rows_become_floats(tmp_path: Path) -> None:
    folder = make_stored(tmp_path, CASES["bnb nf4 nested"], num_hidden_layers=1, intermediate_size=96)
    ids = prompt(12)
    assert_close(PagedModel(folder).step({0: ids})[0], expected_logits(tmp_path / "floats", ids))


def layers_of(model: PagedModel) -> list[Linear]:
    (layer,) = model.model.layers  # type: ignore[attr-defined]  # a decoder has them
    return [layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down]


def kept_bytes(layer: Linear) -> int:
    """Without the order of inputs, which is no part of the weight."""
    assert isinstance(layer.packed, CodedWeight)
    tensors = (layer.packed.codes, layer.packed.scales, layer.packed.offsets)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3", "gpt2", "qwen2"])
def test_families(family: str, tmp_path: Path) -> None:
    """Experts, latent attention, layers stored transposed, biases."""
    transposed = ("attn.c_", "mlp.c_")
    case = replace(
        CASES["gptq 4"],
        transposed=transposed,
        floats=(*CASES["gptq 4"].floats, "mlp.gate.", "wte", "wpe", "ln", "norm"),
    )
    folder = make_stored(tmp_path, case, family)
    ids = prompt(12)
    assert_close(PagedModel(folder).step({0: ids})[0], expected_logits(tmp_path / "floats", ids))


@pytest.mark.parametrize("name", ["gptq 4", "FP8 channel", "W8A16"])
def test_experts_keep_their_bits(name: str, tmp_path: Path) -> None:
    """In the model, in the plan, and in what comes out."""
    case = replace(CASES[name], floats=(*CASES[name].floats, "mlp.gate.", "embed", "norm"))
    folder = make_stored(tmp_path, case, "qwen3-moe")
    ids = prompt(12)
    model = PagedModel(folder)
    assert_close(model.step({0: ids})[0], expected_logits(tmp_path / "floats", ids))
    mlps = [layer.mlp for layer in model.model.layers]  # type: ignore[attr-defined]
    experts = [mlp.experts.packed for mlp in mlps if isinstance(mlp, Experts)]
    packed = [weight for each in experts for weight in (each.gate_up, each.down)]
    assert packed
    assert all(isinstance(weight, CodedWeight) for weight in packed)
    kept = read_model_config(folder).kept
    assert kept is not None
    dense = sum(kept_bytes(linear) for linear in linears_of(model))
    # The packer stores routers in few bits too, which become floats.
    assert kept.layer_bytes == pytest.approx(dense + sum(weight.nbytes for weight in packed), rel=0.01)


def linears_of(model: PagedModel) -> list[Linear]:
    """The dense layers outside experts."""
    layers = model.model.layers  # type: ignore[attr-defined]
    dense = [layer.mlp for layer in layers if not isinstance(layer.mlp, Experts)]
    attention = [linear for layer in layers for linear in (layer.attention.qkv, layer.attention.o)]
    return [*attention, *(linear for mlp in dense for linear in (mlp.gate_up, mlp.down))]


def test_parts_of_a_layer_that_are_stored_in_several_ways(llama: Path, tmp_path: Path) -> None:
    case = replace(CASES["gptq 4"], floats=("k_proj", "up_proj", "lm_head", "embed"))
    folder = pack_checkpoint(llama, tmp_path, case)
    ids = prompt(12)
    model = PagedModel(folder)
    assert_close(model.step({0: ids})[0], expected_logits(tmp_path / "floats", ids))
    assert [type(layer) for layer in layers_of(model)] == [SideBySide, Linear, SideBySide, Linear]


def test_a_device_without_kernels_for_codes_gets_floats(llama: Path, tmp_path: Path) -> None:
    folder = pack_checkpoint(llama, tmp_path, CASES["awq gemm"])
    config = ModelConfig.from_folder(folder)
    source = DeviceWeights(open_checkpoint(folder, config.stored), torch.device("cpu"), torch.float32)
    weight = source.take_linear("model.layers.0.mlp.up_proj", (128, 64), bias=False, transposed=False).weight
    assert torch.equal(weight, load_file(tmp_path / "floats/model.safetensors")["model.layers.0.mlp.up_proj.weight"])


def test_the_plan_says_what_is_stored(llama: Path, tmp_path: Path) -> None:
    config = read_model_config(pack_checkpoint(llama, tmp_path, CASES["gptq 3"]))
    plan = plan_memory(EngineConfig(num_blocks=8), config, available=2**30)
    assert "(gptq, 3 bits)" in plan.describe()[0]
    assert plan.weights == config.spec.weight_bytes("float32")
    assert plan.weights < replace(config, kept=None).spec.weight_bytes("float32")
    with pytest.raises(ConfigError, match=r"quantization is int8, but .* already stored in few bits \(gptq, 3 bits\)"):
        plan_memory(EngineConfig(num_blocks=8, quantization="int8"), config, available=2**30)


UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Tensor]
Damage = Callable[[Tensors], object]


def put(end: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda tensors: tensors.update({f"{UP}.{end}": change(tensors[f"{UP}.{end}"]).contiguous()})


STATE = "weight.quant_state.bitsandbytes__nf4"


def state(**changes: object) -> Damage:
    def change(stored: Tensor) -> Tensor:
        values = json.loads(bytes(stored.tolist())) | changes
        return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    return put(STATE, change)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("gptq 4", put("g_idx", lambda x: x + 1), r"up_proj\.g_idx has groups from 1 to 2; the 2 groups are 0 to 1"),
        ("gptq 4", put("g_idx", lambda x: x - 1), r"g_idx has groups from -1 to 0"),
        ("gptq 4", put("g_idx", lambda x: x[1:]), r"g_idx has shape \[63\], expected \[64\]"),
        ("gptq 4", put("g_idx", lambda x: x.float()), r"g_idx is of dtype F32; supported: I32, U32"),
        ("gptq 4", put("qweight", lambda x: x[1:]), r"qweight has shape \[7, 128\], expected \[8, 128\]"),
        ("gptq 4", put("qzeros", lambda x: x.t()), r"qzeros has shape \[16, 2\], expected \[2, 16\]"),
        ("gptq 4", put("scales", lambda x: x * float("inf")), r"scales has numbers that are not finite"),
        ("gptq 4", lambda tensors: tensors.pop(f"{UP}.scales"), r"tensor .*up_proj\.scales of shape .* is missing"),
        ("gptq 4", lambda tensors: tensors.update(extra=torch.zeros(1)), "1 tensors are not part of the model"),
        ("awq gemm", put("qzeros", lambda x: x[:1]), r"qzeros has shape \[1, 16\], expected \[2, 16\]"),
        ("W4A16", put("weight_shape", lambda x: -x), r"weight_shape is \[-128, -64\], expected \[128, 64\]"),
        ("W4A16", put("weight_packed", lambda x: x.long()), r"weight_packed is of dtype I64; supported: I32, U32"),
        ("W4A16 by activation", put("weight_g_idx", lambda x: x * 0), "does not give 16 inputs to each of 4 groups"),
        ("FP8 block", put("weight_scale", lambda x: x[:1]), r"weight_scale has shape \[1, 2\]; expected one number"),
        (
            "FP8 channel",
            put("weight_scale", lambda x: x * float("nan")),
            "weight_scale has numbers that are not finite",
        ),
        (
            "NVFP4",
            put("weight_global_scale", lambda x: x * 0),
            r"weight_global_scale is \[0\.0\]; expected one positive",
        ),
        ("MXFP4", put("weight_scale", lambda x: x * 0 + 255), "weight_scale has numbers that are not finite"),
        ("bnb nf4", state(blocksize=48), "has blocksize 48; supported: 64, 128"),
        ("bnb nf4", state(shape=[-128, 64]), r"has shape \[-128, 64\]; supported: \[128, 64\]"),
        ("bnb nf4 nested", state(nested_offset="1"), "has nested_offset 1; supported: a finite number"),
        ("bnb nf4 nested", state(nested_blocksize=0), "has no nested_blocksize"),
        ("bnb nf4", put(STATE, lambda x: x[:-1]), "is not a JSON object"),
        ("bnb nf4", put(STATE, lambda x: torch.full((5000,), 91, dtype=torch.uint8)), "has 5000 bytes; at most 4096"),
        ("bnb nf4", put(STATE, lambda x: torch.full((4000,), 91, dtype=torch.uint8)), "is not a JSON object"),
        ("mlx 4", put("biases", lambda x: x[:, :1]), r"biases has shape \[128, 1\], expected \[128, 2\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "damaged",
)
def test_damaged_tensors_are_refused_by_name(
    name: str, damage: Damage, message: str, llama: Path, tmp_path: Path
) -> None:
    folder = pack_checkpoint(llama, tmp_path, CASES[name])
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = ModelConfig.from_folder(folder)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_model(config, open_checkpoint(folder, config.stored), kernels_for("cpu"), "float32")
    assert "\n" not in str(refusal.value)
