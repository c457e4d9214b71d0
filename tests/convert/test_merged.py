"""Adapters merged into what `quire convert` writes: logits and tokens are those of peft on the original."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, LoRARequest, SamplingParams
from quire.convert.run import convert_model
from quire.convert.target import Target
from quire.errors import CheckpointError
from tests.checkpoints import make_checkpoint
from tests.lora.peft_adapters import expected_logprobs, make_adapter
from tests.models.parity import prompt
from tests.paged_model import PagedModel

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8, "target_modules": "all-linear"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3}},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["v_proj", "embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("merged") / "base", "llama")


def merged(base: Path, adapter: Path, to: str) -> Path:
    return convert_model(base, Target.parse(to), adapter.with_name(f"{adapter.name}-merged"), adapter=adapter).path


def logprobs(model: Path, ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(PagedModel(model).step({0: ids})[0], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft(kind: str, base: Path, tmp_path: Path) -> None:
    adapter, ids = make_adapter(tmp_path / kind, base, **KINDS[kind]), prompt(30)
    expected = expected_logprobs(base, adapter, ids)
    assert (expected - expected_logprobs(base, None, ids)).abs().max() > 0.1
    assert (logprobs(merged(base, adapter, "fp32"), ids) - expected).abs().max() <= 2e-4


@pytest.mark.parametrize(("family", "targets"), [("gpt2", ["c_attn", "c_fc", "c_proj"]), ("phi3", ["qkv_proj"])])
@pytest.mark.parametrize("to", ["fp32", "gguf:F32"])
def test_layers_of_other_families(family: str, targets: list[str], to: str, tmp_path: Path) -> None:
    base, ids = make_checkpoint(tmp_path / "base", family), prompt(20)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=targets)
    found = logprobs(merged(base, adapter, to), ids)
    assert (found - expected_logprobs(base, adapter, ids)).abs().max() <= 2e-4


def test_packed_weights_are_those_of_the_merged_floats(base: Path, tmp_path: Path) -> None:
    adapter, ids = make_adapter(tmp_path / "a", base), prompt(30)
    floats = merged(base, adapter, "fp32")
    straight = convert_model(base, Target.parse("int8"), tmp_path / "straight", adapter=adapter).path
    later = convert_model(floats, Target.parse("int8"), tmp_path / "later").path
    assert (straight / "packed.safetensors").read_bytes() == (later / "packed.safetensors").read_bytes()
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with LLM(str(base), enable_lora=True, dtype="float32", threads=1, num_blocks=50, max_model_len=128) as llm:
        (beside,) = llm.generate({"prompt_token_ids": ids}, params, lora_request=LoRARequest("a", 1, str(adapter)))
    with LLM(str(floats), threads=1, num_blocks=50, max_model_len=128) as llm:
        (alone,) = llm.generate({"prompt_token_ids": ids}, params)
    assert alone.outputs[0].token_ids == beside.outputs[0].token_ids


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("gemma", {"target_modules": ["embed_tokens"]}, "changes model.embed_tokens, which is also the model's head"),
        ("gemma", {"modules_to_save": ["embed_tokens"]}, "changes model.embed_tokens, which is also the model's head"),
        ("qwen2", {"target_modules": ["q_proj"]}, r"has \[64, 64\] for model.layers.0.self_attn.q_proj"),
    ],
)
def test_what_cannot_be_merged(family: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    if family == "qwen2":
        base = make_checkpoint(tmp_path / "other", family, hidden_size=32, num_attention_heads=2)
    with pytest.raises(CheckpointError, match=said):
        merged(base, adapter, "fp32")
    assert not (tmp_path / "adapter-merged").exists()


def test_a_layer_that_the_model_lacks_is_named(base: Path, tmp_path: Path) -> None:
    deeper = make_checkpoint(tmp_path / "deeper", "llama", num_hidden_layers=5)
    adapter = make_adapter(tmp_path / "adapter", deeper, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"changes model.layers.[34].self_attn.q_proj, which is no weight"):
        merged(base, adapter, "fp32")
