"""Files of a checkpoint that are not what their names say, and the words for each."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.config import EngineConfig
from quire.engine.chat_template import read_sources
from quire.engine.checkpoint import read_default_params, weight_files
from quire.engine.tokenizer import Tokenizer
from quire.errors import CheckpointError
from quire.model_config import ModelConfig, read_json
from quire.model_config.file_kinds import describe_content, is_file
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.safetensors_file import read_header

READERS: dict[str, Callable[[Path], object]] = {
    "config.json": ModelConfig.from_folder,
    "model.safetensors": open_checkpoint,
    "model.safetensors.index.json": open_checkpoint,
    "tokenizer.json": Tokenizer.from_folder,
    "tokenizer_config.json": read_sources,
    "chat_template.jinja": read_sources,
    "generation_config.json": lambda folder: read_default_params(EngineConfig(), folder),
}


def make(kind: str, path: Path) -> None:
    if kind == "link":
        path.symlink_to("../../blobs/0123")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("name", list(READERS))
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("link", "is a link to ../../blobs/0123, which is not there; copy a folder together with what its links name"),
        ("folder", "is a folder; expected a file"),
        ("pipe", "is no regular file"),
    ],
)
def test_what_is_no_file(name: str, kind: str, message: str, tmp_path: Path) -> None:
    make(kind, tmp_path / name)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} {message}")):
        READERS[name](tmp_path)


def test_a_pipe_among_the_weights_is_not_opened(tmp_path: Path) -> None:
    make("pipe", tmp_path / "model-1.safetensors")
    (tmp_path / "model-2.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model-2.safetensors"]


CONTENTS = {
    b"": "is empty; download the file again",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1": "is a pointer of git-lfs, not the file itself",
    b"\n <!DOCTYPE html><html lang=en>": "is a web page, as a refused download leaves it",
    b"<?xml version='1.0'?><Error><Code>AccessDenied": "is a web page, as a refused download leaves it",
    b"GGUF\x03\0\0\0" + bytes(60): "is a GGUF file; give it a name that ends in .gguf",
    b"PK\x03\x04" + bytes(500): "is a zip archive, as torch.save and downloads of folders write it",
    b"\x80\x02}q\x00(X\x05": "is a pickled file, which can run code",
    b"\x1f\x8b\x08\x00" + bytes(200): "is compressed; unpack it first",
}


@pytest.mark.parametrize("content", list(CONTENTS))
@pytest.mark.parametrize("read", [read_json, read_header])
def test_what_is_in_a_file(read: Callable[[Path], object], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} {CONTENTS[content]}")):
        read(path)


@pytest.mark.parametrize("length", [0x0280, 0x8B1F, 0x7D0280])
def test_a_header_may_have_any_length(length: int, tmp_path: Path) -> None:
    """Its first bytes may be those of another kind."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
    assert read_header(path) == ({}, {})


def test_other_files_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert not is_file(path)
    path.write_text("{}")
    assert is_file(path)
    assert describe_content(path) is None
