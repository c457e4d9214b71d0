"""Hostile safetensors files and adapters: refused in one line, in time and memory that their own size bounds."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.errors import CheckpointError
from quire.lora.adapter_config import CONFIG_FILE, AdapterConfig
from quire.lora.adapter_folder import TENSORS_FILE, AdapterFolder
from quire.models.safetensors_file import read_header
from quire.models.safetensors_weights import SafetensorsWeights


def tensor(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(header: Any, data: int = 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


HOSTILE: dict[str, bytes] = {
    "a length beyond the file": file_of({}, 0, 1 << 40),
    "a length of all bits": file_of({}, 0, (1 << 64) - 1),
    "a length just beyond the file": file_of({}, 0, 3),
    "a negative shape": file_of({"a": tensor([-1, -4], 0, 16)}),
    "a product that wraps around": file_of({"a": tensor([1 << 62, 4], 0, 16)}),
    "a size beyond 64 bits": file_of({"a": tensor([1 << 200], 0, 16)}),
    "a size of thousands of digits": file_of(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'
    ),
    "fifty thousand dimensions": file_of({"a": tensor([1] * 50_000, 0, 4)}, 4),
    "fifty thousand large dimensions": file_of({"a": tensor([999_999_937] * 50_000, 0, 4)}, 4),
    "a shape of floats": file_of({"a": tensor([2.0, 2.0], 0, 16)}),
    "a shape of flags": file_of({"a": tensor([True, 4], 0, 16)}),
    "a shape that is a text": file_of({"a": {"dtype": "F32", "shape": "44", "data_offsets": [0, 16]}}),
    "an end before its begin": file_of({"a": tensor([4], 16, 0)}),
    "a negative offset": file_of({"a": tensor([4], -16, 0)}),
    "tensors over each other": file_of({"a": tensor([4], 0, 16), "b": tensor([2], 8, 16)}),
    "a gap between tensors": file_of({"a": tensor([1], 0, 4), "b": tensor([2], 8, 16)}),
    "one offset": file_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}),
    "lists without end": file_of(b"[" * 50_000),
    "objects without end": file_of(b'{"a":' * 50_000),
    "a list": file_of([]),
    "a tensor that is a number": file_of({"a": 5}),
    "metadata that are a list": file_of({"__metadata__": [1], "a": tensor([4], 0, 16)}),
    "not a text": file_of(b"\xff\xfe{}"),
    "NaN": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
    "nothing": b"",
}
_MOST_BYTES_PER_BYTE = 60
"""Of memory while a header is read, per byte of the file; JSON in Python takes that much."""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert most < 200_000 + _MOST_BYTES_PER_BYTE * len(HOSTILE[name])


def test_mutated_headers_are_read_or_refused(tmp_path: Path) -> None:
    good = file_of({"a.weight": tensor([2, 2], 0, 16), "b": tensor([4], 16, 24, "F16"), "__metadata__": {"x": "y"}}, 24)
    generator, path, read = np.random.default_rng(0), tmp_path / "model.safetensors", 0
    refusals = []
    for _ in range(400):
        content = bytearray(good)
        for _ in range(generator.integers(1, 4)):
            content[generator.integers(len(content))] = generator.integers(256)
        path.write_bytes(content[: generator.integers(1, 2 * len(content))])
        try:
            found = SafetensorsWeights(tmp_path, read_header(path)[0])
            for key, entry in read_header(path)[0].items():
                if entry.dtype == "F32":
                    assert found.take(key, entry.shape).nbytes == entry.end - entry.begin
            read += 1
        except CheckpointError as error:
            refusals.append(str(error))
    assert 0 < read < 400
    assert not [refusal for refusal in refusals if "\n" in refusal]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b"])
def test_an_index_names_files_beside_it(name: str, tmp_path: Path) -> None:
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsWeights.open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["fifty thousand large dimensions", "lists without end", "a product that wraps around"]
)
def test_hostile_adapters(name: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    (tmp_path / TENSORS_FILE).write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError) as caught:
        AdapterFolder.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_thousands_of_patterns_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = {rf"layers\.{number}\.none": 4 for number in range(1000)}
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "rank_pattern": patterns}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    read = AdapterConfig.read(tmp_path)
    compiled: list[str] = []
    compile_one = re.compile
    monkeypatch.setattr("re.compile", lambda pattern, *flags: compiled.append(pattern) or compile_one(pattern, *flags))
    for layer in range(20):
        assert read.rank_of(f"model.layers.{layer}.self_attn.q_proj") == 4
    assert len(compiled) <= 1000
