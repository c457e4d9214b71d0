"""Folders that are something else say what they are and what to do."""

import json
from pathlib import Path

import pytest

from quire.errors import CheckpointError
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from tests.model_config.test_published import PUBLISHED

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"

KINDS = {
    "lora": (
        ["adapter_config.json", "adapter_model.safetensors"],
        "is a LoRA adapter, .*; give the base model's",
    ),
    "gguf": (["model-Q4_K_M.gguf", "README.md"], "is a GGUF model"),
    "one hub model": (["refs/main", "snapshots/abc/config.json", "blobs/x"], "the hub's cache of one model"),
    "hub root": (["models--org--name/refs/main", "version.txt"], "the hub's cache of several models"),
    "mistral": (["params.json", "consolidated.safetensors", "tekken.json"], "a checkpoint in its maker's own format"),
    "meta": (["params.json", "consolidated.00.pth", "tokenizer.model"], "a checkpoint in its maker's own format"),
    "diffusers": (["model_index.json", "unet/config.json"], "is a diffusers pipeline"),
    "onnx": (["model.onnx"], "a model for TensorFlow, Flax, ONNX or another runtime"),
    "training run": (["checkpoint-500/config.json", "trainer_state.json"], "the output of a training run"),
    "weights alone": (["model.safetensors"], "weights and without config.json"),
    "tokenizer alone": (["tokenizer.json", "tokenizer_config.json"], "is a tokenizer without a model"),
    "folders": (["small/config.json", "large/config.json"], "the folder of the checkpoints large, small; give one"),
    "empty": ([], "is empty"),
    "something": (["notes.txt"], "holds notes.txt"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_folders_without_config(kind: str, tmp_path: Path) -> None:
    files, message = KINDS[kind]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelConfig.from_folder(tmp_path)
    assert "config.json is missing" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "holds its weights in pytorch_model.bin; loading pickled files can run code"),
        (["tf_model.h5"], "has neither model.safetensors .*a model for TensorFlow, Flax"),
        (["model.gguf"], "has neither model.safetensors .*a GGUF model"),
        ([], "has neither model.safetensors"),
        (["weights.safetensors"], "If weights.safetensors holds all of the model's weights, rename it"),
        (
            ["a-1-of-2.safetensors", "a-2-of-2.safetensors"],
            "look like shards; download model.safetensors.index",
        ),
        (["consolidated.safetensors"], "consolidated.safetensors holds the weights under their maker's own names"),
    ],
)
def test_weights_of_other_formats(files: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["distilgpt2"]))
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_pointers_of_git_lfs(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["distilgpt2"]))
    (tmp_path / name).write_text(POINTER)

    def read() -> None:
        ModelConfig.from_folder(tmp_path)
        open_checkpoint(tmp_path)

    with pytest.raises(CheckpointError, match=rf"{name} is a pointer of git-lfs, not the file itself; run `git lfs"):
        read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization": {"group_size": 64, "bits": 3}}, "quantization.bits is 3; supported: 2, 4, 8"),
        ({"quantization_config": "gptq"}, 'quantization_config is "gptq"; supported: an object'),
    ],
)
def test_quantised_elsewhere(change: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["SmolLM2-135M"] | change))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)
