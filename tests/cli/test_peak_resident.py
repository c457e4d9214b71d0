"""Peak memory of a serving process, and its plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.planner import fill_in_child
from quire.cli.peak_resident import PROCESS_BYTES, TOKENIZER_SHARE, peak_resident
from quire.config import EngineConfig
from quire.engine.checkpoint import bundled_folder
from quire.engine.memory_plan import plan_memory
from quire.model_config import ModelConfig
from quire.models.safetensors_file import RELEASED_BYTES

MIB = 2**20


def test_a_process_takes_what_was_planned(tmp_path: Path) -> None:
    """The difference between a model of 180 MiB and one of 20 MiB is as planned; interpreter and libraries cancel out.

    Both fill their pools to the last block.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 16384,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"dtype": "float32", "threads": 1}
    small = fill_in_child(**options, num_blocks=32, max_num_seqs=4)
    large = fill_in_child(
        **options,
        model=str(tmp_path),
        load_format="dummy",
        tokenizer=str(bundled_folder()),
        num_blocks=256,
        max_num_seqs=8,
    )
    assert small["unused_blocks"] == large["unused_blocks"] == 0
    assert large["measured"] > 1.5 * small["measured"]
    assert small["measured"] + large["planned"] - small["planned"] == pytest.approx(large["measured"], rel=0.05)


def test_the_larger_of_loading_and_serving_counts(tmp_path: Path) -> None:
    model = replace(ModelConfig.from_folder(bundled_folder()), vocab_size=200_000, checkpoint_dtype="float16")
    (tmp_path / "tokenizer.json").write_bytes(b" " * MIB)
    config = EngineConfig(num_blocks=64, max_logprobs=0, logprobs_memory=2 * MIB, max_num_seqs=1)
    plan = plan_memory(config, model, available=2**40)
    loading = plan.weights + 2 * model.spec.num_matrix_parameters  # all of it: less than the table and what is kept
    assert 200_000 * model.hidden_size * 2 + RELEASED_BYTES > 2 * model.spec.num_matrix_parameters
    assert loading > plan.total + plan.activations
    found = peak_resident(plan, model, tmp_path)
    assert found["total"] == PROCESS_BYTES + TOKENIZER_SHARE * MIB + loading
    served = replace(plan, kv_cache=plan.kv_cache + 2**30)
    assert peak_resident(served, model, tmp_path / "none", 7)["total"] == 7 + served.total + served.activations
