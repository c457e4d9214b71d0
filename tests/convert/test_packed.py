"""Folders of packed weights: the bits of a fresh quantisation, for each kind of family; folders that do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.convert.run import convert_model
from quire.convert.target import Target
from quire.errors import CheckpointError, ConfigError
from quire.kernels import cpu, kernels_for
from quire.model_config import ModelConfig
from quire.model_config.packed_folder import PACKED_FILE
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.more_bits import MoreBits
from tests.checkpoints import make_checkpoint
from tests.models.parity import prompt
from tests.paged_model import PagedModel


def convert(folder: Path, to: str = "int8") -> Path:
    return convert_model(folder, Target.parse(to), folder.with_name(f"{folder.name}-{to}")).path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")
    return folder, convert(folder)


@pytest.mark.parametrize(
    ("family", "to"),
    [
        ("llama", "int4"),  # heads rotated in halves
        ("cohere", "int8"),  # rows of queries reordered
        ("gpt2", "int8"),  # transposed matrices, one for queries, keys and values
        ("qwen2-moe", "int4-fast"),  # experts and a router in floats
        ("deepseek-v2", "int8"),  # matrices that a family computes with
        ("gpt-oss", "int8"),  # all experts in one tensor, which stays as it is
        ("qwen3-next", "int8"),  # recurrent layers
    ],
)
def test_weights_are_those_of_a_fresh_quantisation(
    family: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "m", family)
    more = MoreBits.choose(ModelConfig.from_folder(folder), open_checkpoint(folder), to)
    expected = PagedModel(folder, to, packing=more.around(kernels_for("cpu"))).step({0: prompt(30)})[0]
    made = convert(folder, to)
    packed: list[object] = []
    monkeypatch.setattr(
        cpu, "quantize_linear", lambda *given, **named: packed.append(given) or QUANTIZE(*given, **named)
    )
    assert torch.equal(PagedModel(made, to).step({0: prompt(30)})[0], expected)
    # A transposed half of kv_b_proj and experts in one tensor are the only weights that are quantised anew.
    assert bool(packed) == (family in ("deepseek-v2", "gpt-oss"))


QUANTIZE = cpu.quantize_linear


def test_a_folder_is_served_without_options(pair: tuple[Path, Path]) -> None:
    folder, made = pair
    params = SamplingParams(temperature=0.0, max_tokens=8)
    expected = LLM(str(folder), quantization="int8").generate("ab", params)[0].outputs[0].token_ids
    assert LLM(str(made)).generate("ab", params)[0].outputs[0].token_ids == expected
    assert not (made / "model.safetensors").exists()  # other programs must not take it for a checkpoint of theirs


def test_a_head_that_differs_from_its_embedding_is_kept(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "qwen2", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    for name, head in {"same": 1.0, "other": 2.0}.items():
        copy = Path(shutil.copytree(folder, tmp_path / name))
        table = tensors["model.embed_tokens.weight"]
        save_file({**tensors, "lm_head.weight": table * head}, copy / "model.safetensors", {"format": "pt"})
        expected = PagedModel(copy, "int8").step({0: prompt(20)})[0]
        assert torch.equal(PagedModel(convert(copy), "int8").step({0: prompt(20)})[0], expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": "int4"}, "quantization is int4, but the folder holds weights packed as int8"),
        ({"attention_backend": "sdpa"}, "packed for the kernels of the CPU, and the sdpa backend is chosen"),
        ({"load_format": "dummy"}, "load_format is dummy, but the folder holds packed weights"),
    ],
)
def test_options_that_packed_weights_cannot_have(options: dict[str, Any], said: str, pair: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=said):
        LLM(str(pair[1]), **options)


def _set(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / PACKED_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _set_config(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_set(version=2), "version is 2; supported: 1"),
        (_set(quantization="int3"), "quantization is 'int3'; supported: int8"),
        (_set(packing=1), "packing is 1, and this version of Quire reads .* run quire convert again"),
        (_set(files=["../a.safetensors"]), "files is .*; supported: names of files beside it"),
        (_set(files=["other.safetensors"]), "other.safetensors is missing"),
        (_set(files=5), "files is 5; supported: names"),
        (_set(layers=[]), r"layers is \[\]; supported: names of layers"),
        (_set(layers=["model.layers.0.mlp.down_proj"]), "is missing|no packed weight"),
        (_set_config(num_attention_heads=2, num_key_value_heads=1), "no packed weight of model.layers.0.self_attn"),
        (lambda folder: (folder / "packed.safetensors").write_bytes(b"\x10" * 40), "packed.safetensors"),
        (lambda folder: (folder / PACKED_FILE).write_text("[" * 9000), "nested too deep|cannot be read as JSON"),
    ],
)
def test_damaged_folders(damage: Callable[[Path], object], said: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[1], tmp_path / "m"))
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        PagedModel(folder, "int8")


def test_what_cannot_be_packed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is already packed as int8"):
        convert_model(pair[1], Target.parse("int4"), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
