"""InternLM 2 and 3. Both compute what Llama computes, so transformers' Llama is the oracle.

transformers has no InternLM 2: a checkpoint of Llama is written in its names and its order of rows.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.internlm3 import InternLM3Config

from quire import LLM, SamplingParams
from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint, reference_model, write_tokenizer
from tests.models.parity import assert_close, expected_logits, prompt
from tests.paged_model import PagedModel

NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def fused(parts: list[Tensor], num_kv_heads: int) -> Tensor:
    """Rows of queries, keys and values -> for each KV head those of its queries, its key, its value."""
    return torch.cat([part.unflatten(0, (num_kv_heads, -1)) for part in parts], dim=1).flatten(0, 1).contiguous()


def as_internlm2(llama: Path, folder: Path) -> Path:
    """Write a checkpoint of Llama as InternLM 2 has it."""
    config = json.loads((llama / "config.json").read_text())
    tensors = load_file(llama / "model.safetensors")
    changed = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            tensor = fused(parts, config["num_key_value_heads"])
            name = name.replace("self_attn.q_proj", "attention.wqkv")
        for old, new in NAMES.items():
            name = name.replace(old, new)
        changed[name] = tensor
    folder.mkdir()
    save_file(changed, folder / "model.safetensors")
    rope = config.pop("rope_parameters")
    config |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "rope_theta": rope["rope_theta"]}
    config |= {"bias": config.pop("attention_bias"), "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    del config["mlp_bias"]
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention_bias": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 6, "num_key_value_heads": 3}
        | {"head_dim": 10},
    ],
    ids=str,
)
def test_internlm2_is_llama_in_other_words(overrides: dict[str, Any], tmp_path: Path) -> None:
    llama = make_checkpoint(tmp_path / "llama", "llama", **overrides)
    folder = as_internlm2(llama, tmp_path / "internlm2")
    ids = prompt(50)
    expected = expected_logits(llama, ids)
    for options in ({}, {"kernels": reference, "block_size": 8}):
        model = PagedModel(folder, **options)
        assert_close(torch.cat([model.step({0: step})[0] for step in (ids[:37], ids[37:49], ids[49:])]), expected)
    assert ModelConfig.from_folder(folder).spec.num_parameters == reference_model(llama).num_parameters()


def test_internlm2_generates_what_llama_generates(tmp_path: Path) -> None:
    llama = make_checkpoint(tmp_path / "llama", "llama", attention_bias=True)
    folder = as_internlm2(llama, tmp_path / "internlm2")
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    prompts = [prompt(3 + 5 * index, seed=index) for index in range(17)]
    options: dict[str, Any] = {"threads": 1, "dtype": "float32", "num_blocks": 60, "block_size": 16}
    options |= {"max_model_len": 240, "max_num_batched_tokens": 40, "max_num_seqs": 20}
    with LLM(str(folder), **options) as llm, LLM(str(llama), **options) as oracle:
        expected = [output.outputs[0].token_ids for output in oracle.generate(prompts, params)]
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.stats().total_preemptions > 0
        assert llm.generate(prompts[-1:], params)[0].outputs[0].token_ids == expected[-1]
    with LLM(str(folder), quantization="int8", **{**options, "dtype": "auto"}) as llm:
        assert len(llm.generate(prompts[:2], params)[1].outputs[0].token_ids) == 64


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        (
            "internlm2",
            {"vocab_size": 92544, "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        ),
        (
            "internlm2",
            {"vocab_size": 92544, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
            | {"num_attention_heads": 16, "num_key_value_heads": 8},
        ),
        ("internlm3", {}),
    ],
    ids=["internlm2-7b", "internlm2-1.8b", "internlm3-8b"],
)
def test_published_models_have_the_parameters_of_llama(
    model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config = InternLM3Config(**options) if model_type == "internlm3" else LlamaConfig(**options)
    config.architectures = ["InternLM3ForCausalLM" if model_type == "internlm3" else "InternLM2ForCausalLM"]
    config.save_pretrained(tmp_path)
    change_config(tmp_path, bias=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert ModelConfig.from_folder(tmp_path).spec.num_parameters == model.num_parameters()


def test_a_fused_matrix_that_is_missing(tmp_path: Path) -> None:
    folder = as_internlm2(make_checkpoint(tmp_path / "llama", "llama"), tmp_path / "internlm2")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.attention.wqkv.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"layers.1.attention.wqkv.weight of shape \[256, 64\] is missing"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_internlm3_matches_transformers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "internlm3")
    ids = prompt(50)
    expected = expected_logits(folder, ids)
    change_config(folder, architectures=["InternLM3ForCausalLM"])
    model = PagedModel(folder)
    found = torch.cat([model.step({0: ids[:37]})[0], model.step({0: ids[37:]})[0]])
    assert_close(found, expected)


def test_internlm3_as_it_is_published(tmp_path: Path) -> None:
    """Its files name two kinds of biases; Quire supports one."""
    folder = make_checkpoint(tmp_path, "internlm3")
    ids = prompt(50)
    expected = expected_logits(folder, ids)
    values = json.loads((folder / "config.json").read_text())
    theta = values.pop("rope_parameters")["rope_theta"]
    del values["attention_bias"], values["mlp_bias"]
    values |= {"architectures": ["InternLM3ForCausalLM"], "bias": False, "qkv_bias": False, "rope_theta": theta}
    values["rope_scaling"] = {"rope_type": "dynamic", "factor": 6.0}
    (folder / "config.json").write_text(json.dumps(values))
    assert_close(PagedModel(folder).step({0: ids})[0], expected)
    assert ModelConfig.from_folder(folder).context_length == 6 * 256
    change_config(folder, bias=True)
    with pytest.raises(CheckpointError, match="bias is true; supported: false"):
        ModelConfig.from_folder(folder)
