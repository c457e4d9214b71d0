"""GGUF headers: files written by llama.cpp's package, and damaged and hostile ones."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from quire.errors import CheckpointError
from quire.gguf.file import read_gguf
from quire.gguf.header import read_header


def write(path: Path, *, alignment: int | None = None) -> Path:
    """A file with a value of every type and tensors of three."""
    writer = GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -3)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -300)
    writer.add_uint32("a.u32", 1 << 31)
    writer.add_int32("a.i32", -(1 << 20))
    writer.add_uint64("a.u64", 1 << 40)
    writer.add_int64("a.i64", -(1 << 40))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "grüße")
    writer.add_array("a.texts", ["x", "", "▁y"])
    writer.add_array("a.numbers", [1.5, -2.0])
    writer.add_tensor("m", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("h", np.ones((2, 3), dtype=np.float16))
    blocks = np.zeros((2, 36), dtype=np.uint8)
    writer.add_tensor("q", blocks, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 64])
def test_values_and_places(tmp_path: Path, alignment: int | None) -> None:
    path = write(tmp_path / "m.gguf", alignment=alignment)
    header = read_header(path)
    expected = {
        "a.u8": 200,
        "a.i8": -3,
        "a.u16": 60000,
        "a.i16": -300,
        "a.u32": 1 << 31,
        "a.i32": -(1 << 20),
        "a.u64": 1 << 40,
        "a.i64": -(1 << 40),
        "a.f32": 0.5,
        "a.f64": 0.1,
        "a.flag": True,
        "a.text": "grüße",
        "a.texts": ["x", "", "▁y"],
    }
    assert {key: header.metadata[key] for key in expected} == expected
    numbers = header.metadata["a.numbers"]
    assert isinstance(numbers, memoryview)
    assert numbers.tolist() == [1.5, -2.0]
    assert {name: (t.block.name, t.shape) for name, t in header.tensors.items()} == {
        "m": ("F32", (3, 4)),
        "h": ("F16", (2, 3)),
        "q": ("Q4_0", (2, 64)),
    }
    stored = header.tensors["m"]
    assert np.frombuffer(path.read_bytes()[stored.begin : stored.end], "<f4").tolist() == list(range(12))


def _number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def _text(value: bytes) -> bytes:
    return _number(len(value)) + value


def file_of(keys: bytes = b"", num_keys: int = 0, tensors: bytes = b"", num_tensors: int = 0, tail: int = 256) -> bytes:
    return b"GGUF" + _number(3, 4) + _number(num_tensors) + _number(num_keys) + keys + tensors + bytes(tail)


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dimensions = b"".join(map(_number, shape))
    return _text(name) + _number(len(shape), 4) + dimensions + _number(kind, 4) + _number(offset)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read as GGUF"),
    "another file": (b"PK" + bytes(40), "begins with"),
    "version": (b"GGUF" + _number(1, 4) + bytes(40), "has version 1; supported: 2 and 3"),
    "big-endian": (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), "big-endian"),
    "truncated": (b"GGUF" + _number(3, 4), "ends inside the number of tensors"),
    "many tensors": (file_of(num_tensors=1 << 60), "says that it holds .* tensors; its .* bytes have no room"),
    "many keys": (file_of(num_keys=1 << 60), "metadata keys"),
    "long key": (file_of(_number(1 << 50), 1), "text of .* bytes; at most"),
    "long text": (file_of(_text(b"k") + _number(8, 4) + _number(1 << 40), 1), "k has a text"),
    "long array": (file_of(_text(b"k") + _number(9, 4) + _number(4, 4) + _number(1 << 40), 1), "k has .* elements"),
    "array of arrays": (file_of(_text(b"k") + _number(9, 4) + _number(9, 4) + _number(1), 1), "array of values"),
    "unknown type": (file_of(_text(b"k") + _number(77, 4), 1), "k has a value of type 77"),
    "key twice": (file_of((_text(b"k") + _number(0, 4) + b"1") * 2, 2), "holds k twice"),
    "alignment": (
        file_of(_text(b"general.alignment") + _number(4, 4) + _number(24, 4), 1),
        "general.alignment is 24; supported: a power of two",
    ),
    "tensor twice": (file_of(tensors=tensor(b"t", (4,), 0, 0) * 2, num_tensors=2), "holds the tensor t twice"),
    "dimensions": (file_of(tensors=tensor(b"t", (1,) * 9, 0, 0), num_tensors=1), "9 dimensions"),
    "no numbers": (file_of(tensors=tensor(b"t", (0, 4), 0, 0), num_tensors=1), r"shape \[4, 0\]"),
    "huge": (file_of(tensors=tensor(b"t", (1 << 60, 1 << 60), 0, 0), num_tensors=1), "supported: 1 to"),
    "beyond the end": (file_of(tensors=tensor(b"t", (4096,), 0, 0), num_tensors=1), "it is truncated"),
    "far offset": (file_of(tensors=tensor(b"t", (4,), 0, 1 << 62), num_tensors=1), "it is truncated"),
    "unaligned": (file_of(tensors=tensor(b"t", (4,), 0, 4), num_tensors=1), "expected a multiple of 32"),
    "overlap": (
        file_of(tensors=tensor(b"t", (16,), 0, 0) + tensor(b"u", (4,), 0, 32), num_tensors=2),
        "tensors t and u overlap",
    ),
    "unread type": (file_of(tensors=tensor(b"t", (256,), 16, 0), num_tensors=1), "of type IQ2_XXS; supported: F32"),
    "part of a block": (file_of(tensors=tensor(b"t", (40,), 2, 0), num_tensors=1), "rows of 40 numbers in Q4_0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, said = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as error:
        read_header(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def mutate(content: bytes, generator: np.random.Generator) -> bytes:
    """One of four kinds of damage in the header."""
    changed = bytearray(content)
    at = int(generator.integers(0, min(len(content), 700) - 8))
    changes: list[Callable[[], None]] = [
        lambda: changed.__setitem__(at, int(generator.integers(256))),
        lambda: changed.__setitem__(slice(at, at + 8), struct.pack("<Q", int(generator.integers(1 << 62)))),
        lambda: changed.__delitem__(slice(at, at + int(generator.integers(1, 64)))),
        lambda: changed.__delitem__(slice(at, None)),
    ]
    changes[generator.integers(len(changes))]()
    return bytes(changed)


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "m.gguf").read_bytes()
    generator = np.random.default_rng(0)
    path = tmp_path / "mutated.gguf"
    refused, started = 0, time.process_time()
    for _ in range(1500):
        path.write_bytes(mutate(content, generator))
        try:
            header = read_header(path)
        except CheckpointError as error:
            refused += "\n" not in str(error)
        else:
            size = path.stat().st_size
            assert all(0 <= each.begin < each.end <= size for each in header.tensors.values())
    assert refused > 500
    assert time.process_time() - started < 30


def split(tmp_path: Path) -> list[Path]:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    writer.add_uint32("llama.block_count", 1)
    for name in ("x", "y", "z"):
        writer.add_tensor(name, np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("m-*.gguf"))


def test_parts_are_one_model(tmp_path: Path) -> None:
    parts = split(tmp_path)
    assert len(parts) == 3
    for part in (parts[0], parts[2]):
        model = read_gguf(part)
        assert sorted(model.tensors) == ["x", "y", "z"]
        assert model.integer("llama.block_count") == 1
        assert [model.tensors[name].file for name in ("x", "y", "z")] == parts


def test_missing_and_wrong_parts(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003.gguf: split.no and split.count are \(1, 3\)"):
        read_gguf(parts[0])
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf is missing; the model has 3 parts"):
        read_gguf(parts[0])
    moved = parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="is one of 3 parts, but is not named so"):
        read_gguf(moved)
