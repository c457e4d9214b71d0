"""Families that Quire has no class for, computed by transformers on the paged cache, against transformers alone."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.errors import CheckpointError, ConfigError
from quire.kernels import kernels_for
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from quire.models.transformers_model import TransformersModel
from tests.checkpoints import write_tokenizer
from tests.models.parity import assert_close, prompt
from tests.paged_model import PagedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "initializer_range": 0.12,
}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "jais2": {},
    "hyperclovax": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 1.5},
    "vaultgemma": {
        "sliding_window": 24,
        "layer_types": _WINDOWS,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3n_text": {  # the last two layers take keys and values of the others
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 24,
        "intermediate_size": [112] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 260,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
    "nemotron": {},  # its layers do not pass options on to attention
    "afmoe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "sliding_window": 24},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "cohere2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24, "layer_types": _WINDOWS},
}


def write(folder: Path, model_type: str, **changes: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**_SIZES, **FAMILIES.get(model_type, {}), **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def reference(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def load(folder: Path, dtype: str = "float32") -> None:
    load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), dtype)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_equal_transformers(model_type: str, tmp_path: Path) -> None:
    """A prompt in pieces beside another sequence, and one token after it."""
    folder, ids, other = write(tmp_path, model_type), prompt(50), prompt(30, seed=2)
    model = PagedModel(folder)
    steps = [{0: ids[:37], 1: other[:5]}, {1: other[5:], 0: ids[37:49]}, {0: ids[49:]}]
    outputs = [model.step(step) for step in steps]
    expected = reference(folder)
    with torch.inference_mode():
        for sequence, tokens in enumerate((ids, other)):
            found = torch.cat([output[sequence] for output in outputs if sequence in output])
            assert_close(found, expected(torch.tensor([tokens])).logits[0])


def test_the_engine_serves_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Greedy tokens in a batch, in chunks and from the prefix cache."""
    folder, params = (
        write(tmp_path, "jais2"),
        SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True),
    )
    prompts = [prompt(40, seed) for seed in range(3)]
    with caplog.at_level(logging.WARNING):
        llm = LLM(
            str(folder), dtype="float32", kv_cache_dtype="float32", max_num_batched_tokens=32, max_num_seqs=4, threads=1
        )
    assert "Jais2ForCausalLM has no class in Quire: transformers computes it" in caplog.text
    first, again = llm.generate(prompts, params), llm.generate(prompts, params)
    model = reference(folder)
    for ids, output, repeated in zip(prompts, first, again, strict=True):
        expected = model.generate(torch.tensor([ids]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
        assert output.outputs[0].token_ids == expected[0, 40:].tolist() == repeated.outputs[0].token_ids
    assert again[0].num_cached_tokens
    llm.close()


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "jais2",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "depends on oth",
        ),
        ("xglm", {"d_model": 64, "attention_heads": 4, "ffn_dim": 64, "num_layers": 2}, "compute attention themselves"),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "2 of its 3 layers have no attention"),
        ("llama4_text", {"num_local_experts": 2, "attention_chunk_size": 16}, "goes by chunks"),
        ("diffllama", {}, "layer 0 asks for attention twice"),
        (
            "gemma4_text",
            {"global_head_dim": 32, "hidden_size_per_layer_input": 8},
            r"value elements\) .*; the cache has",
        ),
        ("minicpm3", {}, "latent vectors in the place of keys and values"),
        ("recurrent_gemma", {"lru_width": 64, "attention_window_size": 32}, "keep a recurrent state"),
    ],
)
def test_what_the_cache_cannot_hold_is_refused_by_name(
    model_type: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"ForCausalLM is not supported: .*{message}"):
        load(write(tmp_path, model_type, **changes))


def test_tokens_that_meet_outside_of_attention_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = TransformersModel._hidden
    monkeypatch.setattr(TransformersModel, "_hidden", lambda model, *step: hidden(model, *step).cumsum(0))
    with pytest.raises(CheckpointError, match="its tokens depend on others outside of attention"):
        load(write(tmp_path, "jais2"))


def test_an_error_of_the_library_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("Input language unknown.")

    monkeypatch.setattr(TransformersModel, "_hidden", fail)
    with pytest.raises(CheckpointError, match="Jais2ForCausalLM is not supported: ValueError: Input language unknown"):
        load(write(tmp_path, "jais2"))


def test_sizes_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "jais2") / "config.json"
    config = json.loads(path.read_text())
    del config["num_key_value_heads"]  # the library's default is another than the usual one
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json|is not supported|cannot load"):
        load(tmp_path)


def test_quantisation_and_float8_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "jais2")
    with pytest.raises(ConfigError, match="quantization is int8, but Jais2ForCausalLM is computed by transformers"):
        load(folder, "int8")


def test_names_that_transformers_does_not_have(tmp_path: Path) -> None:
    path = write(tmp_path, "jais2") / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["FutureForCausalLM"], "model_type": "future"}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="FutureForCausalLM is not supported: neither Quire nor transformers"):
        load(tmp_path)


def test_it_is_imported_for_such_models_only() -> None:
    program = "import sys, quire.models.llama, quire.models.registry; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
