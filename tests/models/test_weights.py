"""Every way a checkpoint can be wrong, and the message it gets."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError
from quire.kernels import kernels_for
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.random_weights import RandomWeights
from quire.models.registry import load_model
from quire.models.safetensors_weights import SafetensorsWeights
from quire.models.weights import WeightScope
from tests.checkpoints import LAYER_KINDS, make_checkpoint


def load(folder: Path) -> None:
    load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def refusal(folder: Path) -> str:
    """The message of loading `folder`, without the path of the test's own folder."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value).replace(str(folder), "FOLDER")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama")


@pytest.fixture
def file(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_pages_that_were_given_back_are_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.models.safetensors_weights.RELEASED_BYTES", 30_000)
    weights, expected = open_checkpoint(file.parent), load_file(file)
    taken = {name: weights.take(name, tuple(tensor.shape)) for name, tensor in expected.items()}
    weights.finish()
    for name, tensor in expected.items():
        assert torch.equal(taken[name], tensor)


def test_missing_tensor(folder: Path, file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    assert refusal(folder) == (
        "FOLDER: tensor model.layers.1.mlp.up_proj.weight of shape [112, 64] is missing; under model.layers.1.mlp. it "
        "has model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight"
    )


def test_missing_head_of_an_untied_model(folder: Path, file: Path) -> None:
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    assert refusal(folder).startswith(
        "FOLDER: tensor lm_head.weight of shape [260, 64] is missing; its 29 tensors include "
    )


def test_left_over_tensors(folder: Path, file: Path) -> None:
    tensors = load_file(file)
    tensors |= {f"model.layers.3.extra.{i}": torch.zeros(2) for i in range(7)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(tensors, file)
    assert refusal(folder) == (
        "FOLDER: 7 tensors are not part of the model config.json describes: model.layers.3.extra.0, "
        "model.layers.3.extra.1, model.layers.3.extra.2, model.layers.3.extra.3, model.layers.3.extra.4 and 2 more; "
        "expected only the 30 that were loaded"
    )


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.rotary_emb.cos_cached", torch.zeros(1, 1, 8, 8)),
        ("model.layers.0.self_attn.rotary_emb.sin_cached", torch.zeros(1, 1, 8, 8)),
        ("model.rotary_emb.inv_freq", torch.zeros(16)),
        ("rope.freqs", torch.zeros(16)),
        ("model.layers.0.self_attn.masked_bias", torch.tensor(-1e4)),
        ("model.embed_positions.position_ids", torch.zeros(1, 8, dtype=torch.int64)),
        ("model.layers.1.mlp.down_proj._extra_state", torch.zeros(3, dtype=torch.uint8)),
        ("model.nothing", torch.zeros(0, 4)),
    ],
)
def test_buffers_of_other_years_change_nothing(name: str, tensor: torch.Tensor, folder: Path, file: Path) -> None:
    save_file({**load_file(file), name: tensor}, file)
    load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")


def test_misshapen_tensor(folder: Path, file: Path) -> None:
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.zeros(65)
    save_file(tensors, file)
    assert refusal(folder) == (
        "FOLDER/model.safetensors: tensor model.norm.weight has shape [65], expected [64] by config.json"
    )


def test_doubles_are_read_as_float32(folder: Path, file: Path) -> None:
    tensors = load_file(file)
    expected = SafetensorsWeights.open(folder).take("model.norm.weight", (64,)).clone()
    save_file({name: tensor.double() for name, tensor in tensors.items()}, file)
    found = SafetensorsWeights.open(folder).take("model.norm.weight", (64,))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())


def test_an_adapter_beside_a_model_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "adapter_config.json").write_text("{}")
    open_checkpoint(folder)
    assert "the adapter is not applied, though transformers would" in caplog.text


def test_unsupported_dtype_of_a_tensor(folder: Path, file: Path) -> None:
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)
    save_file(tensors, file)
    assert refusal(folder) == (
        "FOLDER/model.safetensors: tensor model.norm.weight is of dtype I8; supported: F32, F16, BF16, F64"
    )


@pytest.mark.parametrize("missing", [1, 5000, 600_000])
def test_truncated_data(folder: Path, file: Path, missing: int) -> None:
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-missing])
    assert refusal(folder) == (
        f"FOLDER/model.safetensors is truncated: expected {whole} bytes, found {whole - missing}; fetch it again"
    )


@pytest.mark.parametrize("kept", [8, 9, 2000])
def test_truncated_header(folder: Path, file: Path, kept: int) -> None:
    content = file.read_bytes()
    needed = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:kept])
    assert refusal(folder) == (
        f"FOLDER/model.safetensors is truncated: its header alone needs {needed} bytes, found {kept}; fetch it again"
    )


def test_longer_file(folder: Path, file: Path) -> None:
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"more")
    assert refusal(folder) == (
        "FOLDER/model.safetensors is longer than its header says: "
        f"expected {whole} bytes, found {whole + 4}; fetch it again"
    )


@pytest.mark.parametrize("content", [b"{}", b"not a file of tensors at all"])
def test_file_of_another_kind(folder: Path, file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert refusal(folder) == (
        f"FOLDER/model.safetensors ({len(content)} bytes) is not a safetensors file: its header has no valid length"
    )


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "language_model.", "model.language_model.x."]
)
def test_names_of_a_model_inside_another(prefix: str, folder: Path, file: Path) -> None:
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    assert refusal(folder) == (
        f"FOLDER: tensor model.embed_tokens.weight of shape [260, 64] is missing; all its names begin with {prefix}, "
        "as a model inside another one is saved; take that off the names, or save the inner model"
    )


@pytest.mark.parametrize("header", [b'{"a": ', b"[1, 2]", b'{"a": {"dtype": "F32"}}', b"\xff\xfe"])
def test_corrupt_header(folder: Path, file: Path, header: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert re.fullmatch(r"FOLDER/model.safetensors has a corrupt header: .*; fetch it again", refusal(folder))


def test_header_whose_offsets_do_not_fit_a_shape(folder: Path, file: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    assert refusal(folder) == (
        "FOLDER/model.safetensors: tensor a of shape [4] and dtype F32 should have 16 bytes, its header gives it 12"
    )


def test_pickled_weights_are_refused(folder: Path, file: Path) -> None:
    file.rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert message.startswith("FOLDER holds its weights in pytorch_model.bin; loading pickled files can run code")
    assert "AutoModelForCausalLM.from_pretrained('FOLDER').save_pretrained('FOLDER')" in message


def test_no_weights_at_all(folder: Path, file: Path) -> None:
    file.unlink()
    assert refusal(folder) == (
        "FOLDER has neither model.safetensors nor model.safetensors.index.json; found config.json, "
        "generation_config.json, tokenizer.json, tokenizer_config.json"
    )


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return make_checkpoint(tmp_path, "llama", max_shard_size="200KB")

    @pytest.fixture
    def index(self, folder: Path) -> Path:
        return folder / "model.safetensors.index.json"

    def test_missing_shard(self, folder: Path) -> None:
        shard = sorted(folder.glob("model-*.safetensors"))[1]
        shard.unlink()
        assert refusal(folder) == (
            f"FOLDER/{shard.name} is missing; "
            "model.safetensors.index.json says that it holds tensors of this checkpoint"
        )

    def test_files_may_be_named_from_the_folder_on(self, folder: Path, index: Path) -> None:
        content = json.loads(index.read_text())
        content["weight_map"] = {tensor: f"./{name}" for tensor, name in content["weight_map"].items()}
        index.write_text(json.dumps(content))
        load_model(ModelConfig.from_folder(folder), open_checkpoint(folder), kernels_for("cpu"), "float32")

    def test_index_at_odds_with_the_shards(self, folder: Path, index: Path) -> None:
        content = json.loads(index.read_text())
        right = content["weight_map"]["model.norm.weight"]
        wrong = next(name for name in content["weight_map"].values() if name != right)
        content["weight_map"]["model.norm.weight"] = wrong
        index.write_text(json.dumps(content))
        assert refusal(folder) == (
            f"FOLDER/model.safetensors.index.json: tensor model.norm.weight should be in {wrong}, found in {right}"
        )

    def test_index_names_a_tensor_nobody_has(self, folder: Path, index: Path) -> None:
        content = json.loads(index.read_text())
        content["weight_map"]["ghost"] = content["weight_map"]["model.norm.weight"]
        index.write_text(json.dumps(content))
        assert refusal(folder).endswith("found in none of the files")

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}'])
    def test_corrupt_index(self, folder: Path, index: Path, content: str) -> None:
        index.write_text(content)
        assert refusal(folder).startswith("FOLDER/model.safetensors.index.json")


def test_tensors_are_views_of_the_file(folder: Path, file: Path) -> None:
    tensor = open_checkpoint(folder).take("lm_head.weight", (260, 64))
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(value, 16) for value in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            assert line.endswith(str(file))
            return
    pytest.fail("the tensor is mapped nowhere")


class TestRandomWeights:
    def test_depend_on_seed_and_full_name_only(self) -> None:
        first, again, other = RandomWeights(1), RandomWeights(1), RandomWeights(2)
        again.take("b.weight", (3, 3))
        assert torch.equal(WeightScope(first).scope("a").take("x.weight", (4, 5)), again.take("a.x.weight", (4, 5)))
        assert not torch.equal(first.take("a.x.weight", (4, 5)), other.take("a.x.weight", (4, 5)))
        assert not torch.equal(first.take("a.weight", (4, 5)), first.take("b.weight", (4, 5)))

    @pytest.mark.parametrize(
        "family",
        LAYER_KINDS,
    )
    def test_make_every_family(self, family: str, tmp_path: Path) -> None:
        config = ModelConfig.from_folder(make_checkpoint(tmp_path, family))
        model = load_model(config, RandomWeights(), kernels_for("cpu"), "float32")
        logits = model.logits(torch.randn(3, config.hidden_size))
        assert logits.shape == (3, config.vocab_size)
        assert 0.01 < logits.std() < 10
