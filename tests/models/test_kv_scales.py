"""Scales of a float8 cache: no key or value overflows, a checkpoint's own scales are used, and the size of keys and
values does not matter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire import LLM, SamplingParams
from quire.errors import CheckpointError
from quire.kernels import KVLayer, sdpa
from quire.layers.norm import Normed
from quire.layers.step_context import StepContext
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.device_weights import DeviceWeights
from quire.models.kv_scales import LARGEST, largest_rotated, scales_of
from quire.models.registry import load_model
from tests.checkpoints import FAMILIES, make_checkpoint, reference_model

CPU = torch.device("cpu")


def load(folder: Path) -> Any:
    source = DeviceWeights(open_checkpoint(folder), CPU, torch.float32)
    return load_model(ModelConfig.from_folder(folder), source, sdpa, "float32")


def change(folder: Path, **tensors: Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file)


@pytest.mark.parametrize(
    "family",
    [
        "llama-bias",
        "llama-rope-yarn",
        "ministral3",
        "qwen2",
        "qwen3",
        "gpt2",
        "stablelm",
        "stablelm-parallel",
        "gemma",
        "gemma2",
        "gemma3",
        "granite",
        "smollm3",
        "cohere",
        "cohere-qk-norm",
        "cohere2",
        "mixtral",
        "qwen2-moe",
        "qwen3-moe",
        "olmoe",
        "granite-moe",
        "phimoe",
        "glm4-moe",
        "phi3",
        "phi3-longrope",
        "glm",
        "glm4",
        "gptj",
        "starcoder2",
        "gpt-bigcode",
        "gpt-neox",
        "phi",
        "phi-norms",
        "opt",
        "bloom",
        "falcon",
        "falcon-new",
        "falcon-rw",
        "mpt-clipped",
    ],
)
def test_nothing_that_a_model_computes_is_too_large(family: str, tmp_path: Path) -> None:
    """Inputs of any size, in the worst direction of every row, stay inside float8; the bound is not far above them."""
    options: dict[str, Any] = {"n_layer": 1} if family in ("gpt2", "gptj") else {"num_hidden_layers": 1}
    options: dict[str, Any] = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    if "layer_types" in FAMILIES[family][2]:
        options["layer_types"] = ["sliding_attention"]
    folder = make_checkpoint(tmp_path, family, **options)
    model = load(folder)
    model.scale_kv()
    (layer,) = model.layers
    attention, norm = layer.attention, layer.attention_norm
    seen: dict[str, Tensor] = {"k": torch.zeros(()), "v": torch.zeros(())}

    class Recorder:
        """Stands in for kernels and records keys and values as they are stored."""

        def write_kv(self, k: Tensor, v: Tensor, kv: KVLayer, slots: Tensor) -> None:
            for name, x, scale in (("k", k, kv.k_scale), ("v", v, kv.v_scale)):
                assert scale is not None
                seen[name] = torch.maximum(seen[name], (x / scale[:, None]).abs().amax())

        def rotary_write_kv(
            self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor, kv: KVLayer, slots: Tensor
        ) -> None:
            sdpa.rotary_(q, k, positions, table)
            self.write_kv(k, v, kv, slots)

        def paged_attention(self, q: Tensor, *rest: Any) -> Tensor:
            return torch.zeros_like(q)

    attention.attend.kernels = Recorder()
    weight = attention.qkv.packed * norm.weight
    worst = torch.cat((weight, -weight, torch.randn(200, weight.shape[1])))
    plan: Any = type("Plan", (), {"slots": None})
    for size in (1e-2, 1.0, 1e4):
        rows, positions = size * worst, torch.arange(len(worst), dtype=torch.int32) % 200
        context = StepContext(positions, [KVLayer(torch.empty(0), torch.empty(0))], [plan])
        attention(Normed(norm, rows, None), context)
    assert seen["k"] <= LARGEST
    assert seen["v"] <= LARGEST
    # Powers of two cost half, rotation a part, and head norms assume all the length in one dimension.
    assert min(seen["k"], seen["v"]) > LARGEST / 8


def test_bounds_and_scales() -> None:
    table = torch.tensor([[0.6, 1.0, 0.8, 0.0]])
    bounds = torch.tensor([[3.0, 1.0, 4.0, 0.0, 9.0]])
    assert largest_rotated(bounds, None) is bounds
    torch.testing.assert_close(largest_rotated(bounds, table), torch.tensor([[5.0, 1.0, 5.0, 1.0, 9.0]]))
    found = scales_of(torch.tensor([[448.0, 1.0], [449.0, 1.0], [0.0, 0.0], [3e30, 0.0]]))
    assert found[:2].tolist() == [1.0, 2.0]
    assert bool((found > 0).all() & found.isfinite().all())


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale")])
def test_a_checkpoints_own_scales(names: tuple[str, str], shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    for layer in range(3):
        change(folder, **{f"model.layers.{layer}.self_attn.{name}": torch.full(shape, 0.25 + layer) for name in names})
    model = load(folder)
    assert model.layers[1].attention.attend.k_scale is None, "no other cache is scaled"
    model.scale_kv()
    assert model.layers[1].attention.attend.k_scale.tolist() == [1.25, 1.25]
    assert model.layers[2].attention.attend.v_scale.tolist() == [2.25, 2.25]
    assert LLM(str(folder), num_blocks=20, threads=1).generate([[1, 2]], SamplingParams(max_tokens=1))


@pytest.mark.parametrize("scale", [torch.zeros(1), torch.ones(3), torch.tensor([float("nan"), 1.0])], ids=str)
def test_scales_that_cannot_be(scale: Tensor, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    change(folder, **{f"model.layers.0.self_attn.{name}": scale.clone() for name in ("k_scale", "v_scale")})
    with pytest.raises(CheckpointError, match=r"tensor k_scale has shape .* expected one positive number, or 2"):
        load(folder)


def test_a_config_that_quantises_nothing_but_kv(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    for groups, refused in (({}, False), ({"group_0": {"weights": {"num_bits": 8}}}, True)):
        quantization = {"quant_method": "compressed-tensors", "config_groups": groups, "kv_cache_scheme": scheme}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        if refused:
            with pytest.raises(CheckpointError, match="quantization_config"):
                ModelConfig.from_folder(folder)
        else:
            ModelConfig.from_folder(folder)


@pytest.mark.parametrize("exponent", [-14, 14])
def test_how_large_keys_and_values_are_does_not_matter(exponent: int, tmp_path: Path) -> None:
    """Keys and values are made larger or smaller, and queries and the output projection the opposite: the same model.
    Without scales float8 would store its largest number, or zero, for all of them."""
    folder = make_checkpoint(tmp_path / "as made", "llama")
    tensors = load_file(folder / "model.safetensors")
    signs = {"k_proj": 1, "v_proj": 1, "q_proj": -1, "o_proj": -1}
    changed = make_checkpoint(tmp_path / "changed", "llama")
    factors = {name: 2.0 ** (exponent * sign) for name in tensors for kind, sign in signs.items() if kind in name}
    change(changed, **{name: tensors[name] * factor for name, factor in factors.items()})
    prompt = [(11 * place) % 256 for place in range(40)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    with torch.inference_mode():
        expected = reference_model(folder)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    found = []
    for each in (folder, changed):
        llm = LLM(str(each), attention_backend="sdpa", kv_cache_dtype="fp8", num_blocks=20, threads=1)
        (output,) = llm.generate([prompt], params)
        logprobs = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        found.append(torch.tensor(logprobs))
    assert torch.equal(*found)
    assert (found[0] - expected[range(len(prompt) - 1), prompt[1:]]).abs().mean() < 0.3
