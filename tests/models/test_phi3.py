"""What Phi-3 has that Llama has not: fused projections, and a rotation that is chosen by the longest sequence."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.layers.rotary import cos_sin_table
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint, reference_model
from tests.engine.test_parity import assert_greedy
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("phi3", {"num_key_value_heads": 1}),
        ("phi3", {"num_key_value_heads": 4, "sliding_window": None}),
        ("phi3", {"sliding_window": 1}),
        ("phi3", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
        ("phi3", {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 6, "num_key_value_heads": 3}),
        ("phi3-longrope", {"sliding_window": 7}),
        ("phi3-longrope", {"max_position_embeddings": 240}),
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


@pytest.mark.parametrize("family", ["phi3", "phi3-longrope"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family), kernels=reference, block_size=8)


class TestLongrope:
    def test_short_factors_up_to_the_training_length(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "phi3-longrope")
        config = ModelConfig.from_folder(folder)
        assert (config.default_model_len, config.context_length) == (240, 512)
        ids = prompt(240)
        model = PagedModel(folder)
        found = torch.cat([model.step({0: ids[:100]})[0], model.step({0: ids[100:]})[0]])
        assert_close(found, expected_logits(folder, ids))

    def test_long_factors_if_sequences_may_be_longer(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "phi3-longrope")
        ids = prompt(300)
        model = PagedModel(folder, max_model_len=512)
        found = torch.cat([model.step({0: ids[:100]})[0], model.step({0: ids[100:]})[0]])
        assert_close(found, expected_logits(folder, ids))
        # One rotation for all sequences: this one would have the short factors alone.
        assert (PagedModel(folder, max_model_len=241).step({0: ids[:90]})[0] - found[:90]).abs().max() == 0
        assert (expected_logits(folder, ids[:90]) - found[:90]).norm() > 1

    def test_long_sequences_in_batches_chunks_and_after_preemption(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "phi3-longrope")
        params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
        prompts = [prompt(241 + 7 * index, seed=index) for index in range(6)]
        options = {
            "threads": 1,
            "num_blocks": 60,
            "block_size": 16,
            "max_model_len": 400,
            "max_num_batched_tokens": 100,
            "max_num_seqs": 20,
        }
        oracle = reference_model(folder)
        with LLM(str(folder), **options) as llm:
            assert_greedy(oracle, llm.generate(prompts, params), 64)
            assert llm.stats().total_preemptions > 0
            again = llm.generate(prompts[-1:], params)
            assert_greedy(oracle, again, 64)
            assert again[0].num_cached_tokens > 0

    def test_stored_keys_are_found_by_the_same_rotation_only(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path / "model", "phi3-longrope")
        options = {"threads": 1, "num_blocks": 100, "block_size": 16, "disk_cache": str(tmp_path / "blocks")}
        params, ids = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), prompt(90)
        cached = []
        for max_model_len in (None, 120, 512, 300):
            with LLM(str(folder), max_model_len=max_model_len, **options) as llm:
                cached.append(llm.generate([ids], params)[0].num_cached_tokens)
        assert [count > 0 for count in cached] == [False, True, False, True]

    def test_the_factor_of_attention(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "phi3-longrope")
        rope = ModelConfig.from_folder(folder).rope
        assert rope is not None
        factor = math.sqrt(1 + math.log(512 / 240) / math.log(240))
        assert cos_sin_table(rope, 16, 240)[0, 0].item() == pytest.approx(factor)

    @pytest.mark.parametrize("name", ["su", "yarn"])
    def test_old_files(self, name: str, tmp_path: Path) -> None:
        """They say rope_theta and the share beside the section, and its type in other words."""
        folder = make_checkpoint(tmp_path, "phi3-longrope")
        config = ModelConfig.from_folder(folder)
        values = json.loads((folder / "config.json").read_text())
        scaling = values.pop("rope_parameters")
        assert scaling.pop("rope_type") == "longrope"
        values |= {"rope_theta": scaling.pop("rope_theta"), "partial_rotary_factor": 0.75}
        del scaling["partial_rotary_factor"], scaling["original_max_position_embeddings"]
        (folder / "config.json").write_text(json.dumps({**values, "rope_scaling": {**scaling, "type": name}}))
        assert ModelConfig.from_folder(folder) == config

    @pytest.mark.parametrize(
        ("factors", "message"),
        [
            ({"long_factor": None}, r"rope_parameters.long_factor is missing; supported: a list of 6 positive numbers"),
            ({"short_factor": [1.0] * 8}, r"short_factor is \[1.0, .*; supported: a list of 6 positive numbers"),
            ({"short_factor": [1.0] * 5 + [0]}, r"short_factor is .* 0\]; supported: a list of 6 positive numbers"),
            ({"long_factor": 4.0}, "long_factor is 4.0; supported: a list of 6 positive numbers"),
        ],
    )
    def test_factors_that_are_refused(self, factors: dict[str, Any], message: str, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "phi3-longrope")
        values = json.loads((folder / "config.json").read_text())["rope_parameters"]
        change_config(folder, rope_parameters=values | factors)
        with pytest.raises(CheckpointError, match=message):
            ModelConfig.from_folder(folder)


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "lm_head_bias"])
def test_keys_that_the_family_does_not_read_have_no_effect(key: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "phi3")
    config = ModelConfig.from_folder(folder)
    change_config(folder, **{key: True})
    assert ModelConfig.from_folder(folder) == config


@pytest.mark.parametrize(
    ("name", "shape"), [("self_attn.qkv_proj", [128, 64]), ("mlp.gate_up_proj", [224, 64])], ids=["qkv", "gate-up"]
)
def test_a_fused_matrix_of_another_shape(name: str, shape: list[int], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "phi3")
    file, key = folder / "model.safetensors", f"model.layers.1.{name}.weight"
    tensors = load_file(file)
    assert list(tensors[key].shape) == shape
    tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{key} .*\[{shape[0] - 1}, 64\].*\[{shape[0]}, 64\]"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
