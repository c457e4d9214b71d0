"""What MPT has that Llama has not: ALiBi of any range, limits of queries, keys and values, norms without bias."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.mpt.modeling_mpt import MptModel, build_mpt_alibi_tensor

from quire.errors import CheckpointError
from quire.kernels import kernels_for, reference
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    "overrides",
    [
        {"attn_config": {"clip_qkv": 0.2}},
        {"n_heads": 1, "d_model": 20},
        {"n_heads": 12, "d_model": 84},
        {"n_heads": 6, "d_model": 60},
        {"n_heads": 8, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_options_match_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "mpt", **overrides))


def test_reference_kernels_compute_the_same(tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, "mpt-clipped"), kernels=reference, block_size=8)


def test_the_limit_of_the_test_checkpoints_is_reached(tmp_path: Path) -> None:
    ids = prompt(40)
    limited = expected_logits(make_checkpoint(tmp_path / "limited", "mpt-clipped"), ids)
    assert (limited - expected_logits(make_checkpoint(tmp_path / "not", "mpt"), ids)).norm() > 1


@pytest.mark.parametrize("bias_max", [3, 16])
def test_the_largest_slope_is_the_configs(bias_max: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the code that MPT was trained with (llm-foundry); transformers reads the option, but computes with 8."""
    folder = make_checkpoint(tmp_path, "mpt", attn_config={"alibi_bias_max": bias_max})
    found = PagedModel(folder).step({0: prompt(50)})[0]
    assert (found - expected_logits(folder, prompt(50))).norm() > 1

    def with_option(model: Any, num_heads: int, length: int, device: torch.device) -> Tensor:
        return build_mpt_alibi_tensor(num_heads, length, bias_max, device)

    monkeypatch.setattr(MptModel, "build_mpt_alibi_tensor", with_option)
    assert_close(found, expected_logits(folder, prompt(50)))


def test_a_long_prompt_in_pieces(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mpt", max_seq_len=1024, n_heads=6, d_model=60)
    ids = prompt(1000)
    model = PagedModel(folder)
    steps = [ids[:700], ids[700:701], ids[701:]]
    assert_close(torch.cat([model.step({0: step})[0] for step in steps]), expected_logits(folder, ids))


def test_a_matrix_that_is_missing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mpt")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.blocks.2.attn.Wqkv.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"blocks.2.attn.Wqkv.weight of shape \[192, 64\] is missing"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_biases_are_no_part_of_the_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mpt")
    file = folder / "model.safetensors"
    save_file({**load_file(file), "transformer.norm_f.bias": torch.zeros(64)}, file)
    with pytest.raises(CheckpointError, match=r"1 tensors are not part of the model .*transformer.norm_f.bias"):
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")
