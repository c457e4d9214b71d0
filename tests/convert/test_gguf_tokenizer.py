"""Tokenizers in GGUF: the published ids of tokenizers of three kinds, read back from the keys that llama.cpp reads."""

import json
import lzma
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from quire.convert.gguf_file import PlannedTensor, header_bytes, place
from quire.convert.gguf_tokenizer import tokenizer_metadata
from quire.engine.checkpoint import bundled_folder
from quire.engine.tokenizer import Tokenizer
from quire.errors import CheckpointError
from quire.model_config import ModelConfig

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
KINDS = {
    "gpt2": ("gpt2", "gpt-2"),
    "llama3-style-4k": ("gpt2", "llama-bpe"),
    "mistral-v1": ("llama", None),
}


def config_of(folder: Path) -> ModelConfig:
    state = json.loads((folder / "tokenizer.json").read_text())
    numbers = [*state["model"]["vocab"].values(), *(token["id"] for token in state["added_tokens"])]
    return replace(ModelConfig.from_folder(bundled_folder()), vocab_size=max(numbers) + 1, eos_token_ids=())


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_the_published_ones(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA / name, tmp_path / name))
    (folder / "tokenizer.json").write_bytes(lzma.decompress((folder / "tokenizer.json.xz").read_bytes()))
    metadata = tokenizer_metadata(config_of(folder), folder)
    assert (metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")) == KINDS[name]
    del metadata["tokenizer.huggingface.json"]  # Quire would read that one
    tensors = place({"t": PlannedTensor("F32", (1,))})
    path = tmp_path / "m.gguf"
    path.write_bytes(header_bytes({"general.architecture": "llama", **metadata}, tensors) + bytes(32))
    tokenizer = Tokenizer.from_folder(path)
    for line in (folder / "vectors.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert tokenizer.encode(row["text"]) == row["ids"], row


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(CheckpointError, match="its tokenizer is of the kind WordLevel; supported in GGUF"):
        tokenizer_metadata(config_of(tmp_path), tmp_path)
