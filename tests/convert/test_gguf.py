"""GGUF files that Quire writes: logits of the original, ggml's own bits, metadata as llama.cpp's package reads them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quire.convert.block_writers import BLOCK_WRITERS
from quire.convert.companions import MODEL_TYPES
from quire.convert.run import convert_model
from quire.convert.target import Target
from quire.engine.tokenizer import Tokenizer
from quire.errors import CheckpointError
from quire.gguf.families import FAMILIES as GGUF_FAMILIES
from quire.gguf.file import read_gguf
from quire.models.gguf_weights import GgufWeights
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_close, expected_logits, prompt
from tests.paged_model import PagedModel


def to_gguf(folder: Path, block: str = "F32") -> Path:
    return convert_model(folder, Target.parse(f"gguf:{block}"), folder.with_suffix(f".{block}.gguf")).path


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama-rope-llama3", {}),
        ("gemma3", {"num_hidden_layers": 6, "layer_types": None, "query_pre_attn_scalar": 32}),
        ("qwen2-moe", {"mlp_only_layers": []}),
        ("stablelm-parallel", {}),
        ("gpt2", {}),
        ("phi3-longrope", {}),
        ("falcon-new", {}),
        ("mpt-clipped", {}),
        ("glm4-moe", {}),
    ],
)
def test_logits_are_those_of_the_original(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", family, **changes)
    path = to_gguf(folder)
    ids = prompt(30)
    assert_close(PagedModel(path).step({0: ids})[0], expected_logits(folder, ids))
    reader = gguf.GGUFReader(path)
    assert {tensor.name for tensor in reader.tensors} == set(read_gguf(path).tensors)


@pytest.mark.parametrize("block", [name for name in BLOCK_WRITERS if name not in ("F32",)])
def test_blocks_are_those_of_ggml(block: str) -> None:
    rows = torch.randn(9, 96, generator=torch.Generator().manual_seed(0))
    rows[0], rows[1, :32], rows[2, 3] = 0.0, 1.0, 50.0
    expected = quants.quantize(rows.numpy(), GGMLQuantizationType[block])
    assert np.array_equal(BLOCK_WRITERS[block](rows).numpy(), expected.view(np.uint8).reshape(9, -1))


def test_a_gguf_file_is_stored_anew(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "gemma2", intermediate_size=128, query_pre_attn_scalar=32)
    first = to_gguf(folder)
    second = convert_model(first, Target.parse("gguf:Q4_1"), tmp_path / "n.gguf").path
    old, new = read_gguf(first), read_gguf(second)
    assert {**old.metadata, "general.file_type": 3} == new.metadata
    assert new.tensors["blk.0.ffn_up.weight"].block.name == "Q4_1"
    assert new.tensors["token_embd.weight"].block.name == "Q8_0"
    assert new.tensors["blk.0.attn_norm.weight"].block.name == "F32"
    name = "model.layers.1.mlp.up_proj.weight"
    before, after = (GgufWeights(file).take(name, (128, 64)) for file in (old, new))
    assert 0 < (before - after).abs().max() < 0.1 * before.abs().max()


@pytest.mark.parametrize(("family", "changes"), [("gpt2", {}), ("gemma2", {"query_pre_attn_scalar": 32})])
def test_floats_go_back_to_the_hubs_form(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """transformers, which checks the types of config.json, reads what came out of a GGUF file."""
    folder = make_checkpoint(tmp_path / "m", family, **changes)
    path = convert_model(to_gguf(folder), Target.parse("fp32"), tmp_path / "back").path
    ids = prompt(30)
    assert_close(expected_logits(path, ids), expected_logits(folder, ids))
    assert Tokenizer.from_folder(path).encode("Hello, you!") == Tokenizer.from_folder(folder).encode("Hello, you!")


def test_every_architecture_has_transformers_type() -> None:
    assert MODEL_TYPES.keys() == {row.architecture for row in GGUF_FAMILIES.values()}
    wrong = {name: kind for name, kind in MODEL_TYPES.items() if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) != name}
    assert not wrong


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("qwen2-window", "its layer_windows is .* and a reader of the file would take it for"),
        ("llama-rope-dynamic", "rope_type dynamic cannot be written as GGUF"),
        ("qwen3-next", "Qwen3NextForCausalLM cannot be written as GGUF; supported: LlamaForCausalLM"),
        ("opt", "OPTForCausalLM cannot be written as GGUF; supported: LlamaForCausalLM"),
        ("phi-norms", "tensors of this PhiForCausalLM have no place in GGUF"),
    ],
)
def test_models_without_a_gguf_form(family: str, said: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", family)
    with pytest.raises(CheckpointError, match=said):
        to_gguf(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
