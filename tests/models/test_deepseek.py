"""DeepSeek-V2 and V3: latent attention, group-limited routers, shared experts, dense layers first."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.attention import expansion
from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.model_config import ModelConfig
from quire.models import latent_attention
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.expanded_attention import attend_expanded
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint, reference_model
from tests.model_config.test_published import PUBLISHED
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.models.test_qwen_moe import fuse
from tests.paged_model import PagedModel

FAMILIES = ["deepseek-v2", "deepseek-v3"]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("deepseek-v2", {"topk_method": "greedy", "n_group": None, "topk_group": None, "rope_parameters": None}),
        ("deepseek-v2", {"q_lora_rank": 24, "attention_bias": True, "mlp_bias": False, "first_k_dense_replace": 0}),
        ("deepseek-v2", {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 36}),
        ("deepseek-v2", {"num_attention_heads": 2, "num_key_value_heads": 2, "n_shared_experts": 1}),
        ("deepseek-v2", {"attention_bias": True, "first_k_dense_replace": 2, "tie_word_embeddings": True}),
        ("deepseek-v3", {"q_lora_rank": None, "attention_bias": False, "norm_topk_prob": False}),
        ("deepseek-v3", {"rope_interleave": False, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 5}),
        ("deepseek-v3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_at_a_time(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    ids = prompt(20)
    model = PagedModel(folder)
    assert_close(torch.cat([model.step({0: [token]})[0] for token in ids]), expected_logits(folder, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_long_chunks_make_keys_and_values(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over rows that are there and rows of the step, beside short sequences, whichever tokens are read."""
    folder = make_checkpoint(tmp_path, family)
    ids = prompt(240)
    calls = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments[1]))
        return attend_expanded(*arguments)

    monkeypatch.setattr(latent_attention, "attend_expanded", counted)
    model = PagedModel(folder, kv_dtype=dtype)
    found = [model.step({0: ids[:20], 1: ids[:3]})[0], model.step({1: ids[3:9], 0: ids[20:230], 2: ids[:200]})[0]]
    assert calls == [210, 200] * 3
    found.append(model.step({0: ids[230:]})[0])
    tolerance = 2e-4 if dtype == torch.float32 else 0.3
    assert_close(torch.cat(found), expected_logits(folder, ids), tolerance)
    for read, replan in (({0: 1, 1: 2}, True), ({0: 1, 1: 2}, False), ({0: 200, 1: 4}, True)):
        again = PagedModel(folder, kv_dtype=dtype)
        again.step({0: ids[:20]})
        part = again.step({0: ids[20:230], 1: ids[:9]}, read, replan=replan)
        assert_close(part[0], torch.cat(found)[230 - read[0] : 230], 1e-4 if dtype == torch.float32 else 0.3)
        assert len(part[1]) == read[1]


def test_quantised_layers_make_keys_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, "deepseek-v2")
    ids = prompt(200)
    expanded = PagedModel(folder, "int8").step({0: ids})[0]
    monkeypatch.setattr(expansion, "MIN_NEW_TOKENS", 1000)
    rows = PagedModel(folder, "int8").step({0: ids})[0]
    assert 0 < (expanded - rows).norm() < 0.2 * rows.norm()


@pytest.mark.parametrize("mscale", [0.0, 0.9])
def test_a_stretched_rotary_embedding_raises_the_scale_of_scores(mscale: float, tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    folder = make_checkpoint(tmp_path, "deepseek-v3", rope_parameters=rope)
    theirs = reference_model(folder).model.layers[0].self_attn.scaling
    assert ModelConfig.from_folder(folder).attention_scale == pytest.approx(theirs)
    assert_equals_transformers(folder)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "deepseek-v3")
    ids = prompt(20)
    expected = PagedModel(folder).step({0: ids})[0]
    fuse(folder)
    assert torch.equal(PagedModel(folder).step({0: ids})[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_rows_are_counted(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    spec = ModelConfig.from_folder(folder).spec
    assert spec.num_parameters == reference_model(folder).num_parameters()
    assert spec.kv_bytes_per_token("float32") == 3 * 4 * (32 + 16)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
    return str(caught.value)


def test_layers_that_predict_later_tokens_are_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_checkpoint(tmp_path, "deepseek-v3")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    extra = {"model.layers.3.eh_proj.weight": torch.ones(2), "model.layers.3.mlp.gate.weight": torch.ones(2)}
    save_file({**tensors, **extra}, file)
    with caplog.at_level(logging.WARNING):
        PagedModel(folder)
    assert caplog.messages == ["layer 3 of this checkpoint predicts a token after the next one; it is not used"]
    save_file({**tensors, "model.layers.3.mlp.gate.weight": torch.ones(2)}, file)
    assert "1 tensors are not part of the model config.json describes" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["self_attn.kv_a_layernorm", "self_attn.kv_b_proj", "self_attn.q_a_proj", "mlp.shared_experts.up_proj"]
)
def test_tensors_that_are_missing(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "deepseek-v3")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.{name}.weight"]
    save_file(tensors, file)
    assert f"tensor model.layers.1.{name}.weight of shape" in refusal(folder)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("deepseek-v2", {"topk_method": "noaux_tc"}, 'topk_method is "noaux_tc"; supported: greedy, group_limited_'),
        ("deepseek-v2", {"scoring_func": "sigmoid"}, 'scoring_func is "sigmoid"; supported: "softmax"'),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob is true; supported: false"),
        ("deepseek-v2", {"n_group": 3}, "n_group is 3; supported: a divisor of the number of experts 8"),
        ("deepseek-v2", {"moe_layer_freq": 2}, "moe_layer_freq is 2; supported: 1"),
        ("deepseek-v2", {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; supported: an even number"),
        ("deepseek-v2", {"kv_lora_rank": 0}, "kv_lora_rank is 0; supported: an integer of at least 1"),
        ("deepseek-v2", {"kv_lora_rank": 31}, "has shape [48, 64], expected [47, 64] by config.json"),
        ("deepseek-v3", {"topk_method": "greedy"}, 'topk_method is "greedy"; supported: "noaux_tc"'),
        ("deepseek-v3", {"v_head_dim": 21}, "has shape [176, 32], expected [180, 32] by config.json"),
        (
            "deepseek-v3",
            {"quantization_config": {"quant_method": "mxfp4"}},
            'quantization_config is "mxfp4"; supported: floats, gptq, awq',
        ),
    ],
)
def test_options_that_are_refused(family: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    change_config(folder, **change)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("DeepSeek-V2-Lite", 15.7, 2.7), ("DeepSeek-V3", 671.0, 37.6), ("Kimi-K2-Instruct", 1026.4, 32.9)],
)
def test_published_models_are_planned(name: str, total: float, active: float, tmp_path: Path) -> None:
    """Billions of parameters, and of those that a token passes."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    spec = ModelConfig.from_folder(tmp_path).spec
    assert (round(spec.num_parameters / 1e9, 1), round(spec.num_active_parameters / 1e9, 1)) == (total, active)


def test_a_token_of_v2_lite_takes_a_ninth_of_its_keys_and_values(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["DeepSeek-V2-Lite"]))
    config = ModelConfig.from_folder(tmp_path)
    expanded = 27 * 16 * (128 + 64 + 128) * 2
    assert expanded / config.spec.kv_bytes_per_token("bfloat16") == pytest.approx(8.9, abs=0.02)
    assert config.context_length == 163840
