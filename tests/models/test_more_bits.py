"""Layers of int4 that get 8 bits: which they are, that they fit their memory, the same in every way of loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire import LLM, SamplingParams
from quire.convert.run import convert_model
from quire.convert.target import Target
from quire.kernels import cpu
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.more_bits import MoreBits, relative_error
from quire.quantization import METHODS
from tests.checkpoints import make_checkpoint
from tests.lora.peft_adapters import make_adapter

INT4 = METHODS["int4"]
PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=0)
OPTIONS: dict[str, Any] = {"threads": 1, "num_blocks": 64, "max_model_len": 64, "max_num_seqs": 4, "dtype": "float32"}


def change(folder: Path, **layers: str) -> Path:
    """Change matrices of a checkpoint: "spiky" ones have outliers, which 4 bits change more; "coarse" ones have 16
    levels already."""
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        kind = next((kind for part, kind in layers.items() if part.replace("__", ".") in name), None)
        if kind is not None and tensors[name].dim() == 2:
            tensors[name] = _changed(tensors[name], kind)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _changed(weight: Tensor, kind: str) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    if kind == "coarse":
        return torch.randint(0, 16, weight.shape, generator=draw) * 0.0078125 - 0.0625
    spikes = torch.rand(weight.shape, generator=draw) < 0.05
    return torch.where(spikes, weight * 12, weight)


def chosen(folder: Path, quantization: str = "int4") -> MoreBits:
    config = ModelConfig.from_folder(folder)
    return MoreBits.choose(config, open_checkpoint(folder), quantization)


@pytest.fixture(scope="module")
def spiky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "m", "llama")
    return change(folder, layers__1__self_attn__o_proj="spiky")


def test_the_layers_that_change_most_are_chosen(spiky: Path) -> None:
    found = chosen(spiky)
    assert found.chosen[0].layer == "model.layers.1.self_attn.o_proj"
    assert found.chosen[0].error == max(each.error for each in found.chosen)
    assert chosen(spiky) == found
    config = ModelConfig.from_folder(spiky)
    assert 0 < sum(each.num_bytes for each in found.chosen) <= INT4.extra_bytes(config.spec.layer_parameters)
    assert "model.layers.1.self_attn.o_proj" in found.describe()
    assert "8 bits for" in found.describe()


def test_what_has_few_bits_already_needs_no_more(tmp_path: Path) -> None:
    folder = change(make_checkpoint(tmp_path / "m", "llama"), layers="coarse")
    found = chosen(folder)
    assert found.num_measured == 4 * ModelConfig.from_folder(folder).num_layers
    assert found.chosen == ()
    assert found.describe() == "int4 (no layer needs more bits)"


@pytest.mark.parametrize(("family", "quantization"), [("llama", "int8"), ("llama", "int4-fast"), ("qwen2-moe", "int4")])
def test_what_has_no_such_layers(family: str, quantization: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", family)
    assert chosen(folder, quantization) == MoreBits(quantization)
    config = ModelConfig.from_folder(folder)
    assert config.spec.expert_layers or not METHODS[quantization].extra_bits


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma2", "qwen3-next"])
def test_every_kind_of_family_is_measured(family: str, tmp_path: Path) -> None:
    """Transposed matrices, fused ones, reordered rows, recurrent layers."""
    changes = {"num_experts": 0} if family == "qwen3-next" else {}
    config = ModelConfig.from_folder(folder := make_checkpoint(tmp_path / "m", family, **changes))
    found = MoreBits.choose(config, open_checkpoint(folder), "int4")
    assert found.num_measured >= 3 * config.num_layers
    assert all(each.layer for each in found.chosen)


def answers(model: Path, **options: Any) -> Any:
    with LLM(str(model), **OPTIONS | options) as llm:
        outputs = llm.generate([{"prompt_token_ids": list(range(9, 30))}, {"prompt_token_ids": [5]}], PARAMS)
    return [(output.prompt_logprobs, output.outputs[0].logprobs) for output in outputs]


def test_every_way_of_loading_has_the_same_layers(spiky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    quantize = cpu.quantize_linear

    def count(weights: Any, stored: Any, *others: Any) -> Any:
        packed.append(stored.bits)
        return quantize(weights, stored, *others)

    monkeypatch.setattr(cpu, "quantize_linear", count)
    expected = answers(spiky, quantization="int4", weights_cache=str(tmp_path / "cache"))
    num_chosen = len(chosen(spiky).chosen)
    assert num_chosen
    # A sample of each layer is quantised first; the head has 8 bits in any case.
    assert packed.count(8) == num_chosen + 1
    assert answers(spiky, quantization="int4", weights_cache=str(tmp_path / "cache")) == expected
    adapter = make_adapter(tmp_path / "a", spiky, seed=1)
    assert answers(spiky, quantization="int4", enable_lora=True, lora_modules=f"a={adapter}") == expected
    made = convert_model(spiky, Target.parse("int4"), tmp_path / "int4").path
    assert answers(made) == expected


def test_the_error_of_a_format() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    narrow, wide = (relative_error(weight, stored) for stored in (INT4.layers, INT4.head))
    assert 0.05 < narrow < 0.1
    assert 0.001 < wide < 0.01
    assert relative_error(torch.zeros(4, 64), INT4.layers) == 0.0
