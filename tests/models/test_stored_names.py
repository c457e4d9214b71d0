"""Checkpoints as transformers loads them: names with and without prefix, tied heads, shards, and what lies beside."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.errors import CheckpointError
from quire.models.checkpoint_formats import open_checkpoint
from tests.checkpoints import make_checkpoint
from tests.models.parity import assert_close, expected_logits, prompt
from tests.paged_model import PagedModel

Tensors = dict[str, Tensor]
FAMILIES = {"llama": "lm_head", "gpt2": "lm_head", "opt": "lm_head", "gpt-neox": "embed_out", "phi3": "lm_head"}
"""Families with different prefixes, and what their heads are called."""


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file({name: x.clone() for name, x in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def assert_loads_as_transformers(folder: Path) -> None:
    ids = prompt(20)
    assert_close(PagedModel(folder).step({0: ids})[0], expected_logits(folder, ids))


def without_prefix(tensors: Tensors) -> Tensors:
    return {re.sub(r"^(model|transformer|gpt_neox)\.", "", name): x for name, x in tensors.items()}


def half_without_prefix(tensors: Tensors) -> Tensors:
    short = {"layers.0.", "h.0."}
    return {
        bare if (bare := next(iter(without_prefix({name: x})))) and any(part in bare for part in short) else name: x
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [without_prefix, half_without_prefix])
def test_names_without_prefix(family: str, change: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    rewrite(make_checkpoint(tmp_path, family), change)
    assert_loads_as_transformers(tmp_path)


def embedding_of(tensors: Tensors) -> str:
    return next(name for name in tensors if re.search(r"(embed_tokens|wte|embed_in)\.weight$", name))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_with_other_values_is_a_head(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(
        make_checkpoint(tmp_path, family, tie_word_embeddings=True),
        lambda tensors: tensors | {f"{FAMILIES[family]}.weight": tensors[embedding_of(tensors)].flip(0)},
    )
    with caplog.at_level(logging.WARNING):
        assert_loads_as_transformers(tmp_path)
    assert "with other values than the embeddings, although tie_word_embeddings is true" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_with_the_same_values_is_tied(family: str, tmp_path: Path) -> None:
    rewrite(
        make_checkpoint(tmp_path, family, tie_word_embeddings=True),
        lambda tensors: tensors | {f"{FAMILIES[family]}.weight": tensors[embedding_of(tensors)]},
    )
    assert_loads_as_transformers(tmp_path)
    assert type(PagedModel(tmp_path).model.embedding).__name__ == "TiedEmbedding"  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_model_may_be_stored_as_its_head_alone(family: str, tmp_path: Path) -> None:
    """As safetensors' save_model does."""

    def change(tensors: Tensors) -> Tensors:
        name = embedding_of(tensors)
        return {f"{FAMILIES[family]}.weight" if key == name else key: x for key, x in tensors.items()}

    rewrite(make_checkpoint(tmp_path, family, tie_word_embeddings=True), change)
    assert_loads_as_transformers(tmp_path)


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return make_checkpoint(tmp_path, "llama", max_shard_size="200KB")

    def test_the_index_says_which_copy_counts(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        expected = PagedModel(folder).step({0: prompt(5)})[0]
        for name in ("model.norm.weight", "model.embed_tokens.weight"):
            for other in set(index.values()) - {index[name]}:
                tensors = load_file(folder / other)
                shape = load_file(folder / index[name])[name].shape
                save_file(tensors | {name: torch.full(shape, 7.0)}, folder / other)
        assert torch.equal(PagedModel(folder).step({0: prompt(5)})[0], expected)

    def test_a_whole_file_goes_before_an_index_left_beside_it(self, folder: Path) -> None:
        whole = make_checkpoint(folder / "whole", "llama", seed=1) / "model.safetensors"
        whole.rename(folder / "model.safetensors")
        assert_loads_as_transformers(folder)
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()
        assert_loads_as_transformers(folder)

    def test_files_elsewhere_are_not_read(self, folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
        with pytest.raises(CheckpointError, match=r"\.\./model\.safetensors is not the name of a file beside it"):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
            "corrupt header: ValueError: -16 is not a",
        ),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16]}}, r"corrupt header: ValueError: 0\.0 is not"),
        ({"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}, r"corrupt header: ValueError: 4\.0 is not"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "corrupt header: ValueError: True is not"),
        ({"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}, "corrupt header: TypeError"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}, "corrupt header: ValueError"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "corrupt header: KeyError"),
        ({"a": 5}, "corrupt header: TypeError"),
        (
            {
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
            },
            "corrupt header: tensor b begins at byte .*, the one before it ends at",
        ),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}, "corrupt header: tensor a begins at byte"),
    ],
)
def test_headers_that_lie(header: dict[str, object], message: str, tmp_path: Path) -> None:
    content = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(24))
    if "24" not in str(header):
        (tmp_path / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(16))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("suffix", "formats"), [("qweight", "GPTQ and AWQ"), ("weight_packed", "llm-compressor")])
def test_layers_that_another_format_stores(suffix: str, formats: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        layer = "model.layers.0.self_attn.q_proj"
        return {f"{layer}.{suffix}" if name == f"{layer}.weight" else name: x for name, x in tensors.items()}

    rewrite(make_checkpoint(tmp_path, "llama"), change)
    with pytest.raises(CheckpointError, match=rf"it has .*\.{suffix}, as {formats}.* no quantization_config"):
        PagedModel(tmp_path)
