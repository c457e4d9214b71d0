"""A second start packs nothing and computes the same. A fault of a file, its folder or the disk costs a line in the log
and never a start."""

import errno
import fcntl
import json
import logging
import mmap
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quire import LLM, SamplingParams
from quire.kernels import cpu
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.packed_weights import PackedWeights
from quire.models.registry import Model, load_model
from quire.models.weights_cache import PackedTensor, WeightsCache
from quire.quantization import METHODS, WeightFormat
from tests.checkpoints import LAYER_KINDS, make_checkpoint

KEY, OTHER_KEY = b"k" * 16, b"o" * 16
LIMIT = 1 << 24


def load(folder: Path, dtype: str, stored: Sequence[PackedTensor] = ()) -> tuple[Model, PackedWeights]:
    packed = PackedWeights(mmap.mmap(-1, 1 << 20), stored)
    model_config, source = ModelConfig.from_folder(folder), open_checkpoint(folder)
    return load_model(model_config, source, cpu, dtype, packing=packed), packed


def logits(model: Model) -> torch.Tensor:
    return model.logits(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))


def store(cache: WeightsCache, parts: Sequence[PackedTensor]) -> None:
    cache.store(parts)
    cache.close()


@pytest.fixture
def parts(tmp_path: Path) -> list[PackedTensor]:
    return load(make_checkpoint(tmp_path / "model", "llama"), "float32")[1].parts


@pytest.fixture
def cache(tmp_path: Path) -> WeightsCache:
    return WeightsCache(tmp_path / "a" / "cache", KEY, LIMIT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "family",
    LAYER_KINDS,
)
def test_a_second_load_packs_nothing(family: str, dtype: str, tmp_path: Path, cache: WeightsCache) -> None:
    folder = make_checkpoint(tmp_path / "model", family)
    first, packed = load(folder, dtype)
    assert packed.num_packed > 0
    store(cache, packed.parts)
    second, found = load(folder, dtype, cache.load())
    assert found.num_packed == 0
    assert torch.equal(logits(first), logits(second))
    assert [bytes(part.content) for part in found.parts] == [bytes(part.content) for part in packed.parts]


def test_others_can_read_the_file(cache: WeightsCache, parts: list[PackedTensor]) -> None:
    store(cache, parts)
    with safe_open(cache.path, framework="pt") as file:
        assert bytes(file.get_tensor("0").numpy()) == bytes(parts[0].content)
    header_bytes = int.from_bytes(cache.path.read_bytes()[:8], "little")
    assert (8 + header_bytes) % 4096 == 0  # tensors lie as well as memory of their own would


@pytest.mark.parametrize("place", [0, 7, 60, 2000, 5000, 100_000, -1])
def test_an_altered_file_is_a_miss(
    place: int, cache: WeightsCache, parts: list[PackedTensor], caplog: pytest.LogCaptureFixture
) -> None:
    store(cache, parts)
    content = bytearray(cache.path.read_bytes())
    content[place] ^= 1
    cache.path.write_bytes(content)
    assert cache.load() == []
    assert len(caplog.records) == 1
    assert f"{cache.path} cannot be used" in caplog.text
    store(cache, parts)
    assert len(cache.load()) == len(parts)


@pytest.mark.parametrize("kept", [0, 5, 500, 5000, -1])
def test_a_truncated_file_is_a_miss(
    kept: int, cache: WeightsCache, parts: list[PackedTensor], caplog: pytest.LogCaptureFixture
) -> None:
    store(cache, parts)
    cache.path.write_bytes(cache.path.read_bytes()[:kept])
    assert cache.load() == []
    assert len(caplog.records) == 1


def test_a_header_with_other_contents_is_a_miss(cache: WeightsCache, parts: list[PackedTensor]) -> None:
    store(cache, parts)
    content = cache.path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["0"]["shape"].reverse()
    text = json.dumps(header).encode().ljust(size)
    cache.path.write_bytes(content[:8] + text + content[8 + size :])
    assert cache.load() == []


def test_no_file_is_no_message(cache: WeightsCache, caplog: pytest.LogCaptureFixture) -> None:
    assert cache.load() == []
    assert caplog.records == []


def test_weights_that_changed_under_the_same_key_are_packed_anew(tmp_path: Path, parts: list[PackedTensor]) -> None:
    """An edit that keeps size, time and header: three rows of each weight are compared."""
    folder = tmp_path / "model"
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        name = "model.layers.1.mlp.down_proj.weight"
        old = tensors.get_tensor(name).contiguous().numpy().tobytes()
    content = file.read_bytes()
    file.write_bytes(content.replace(old, b"\0" * len(old)))
    fresh, _ = load(folder, "float32")
    model, packed = load(folder, "float32", parts)
    assert packed.num_packed == 1
    assert [bytes(part.content) for part in packed.parts] == [
        bytes(part.content) for part in load(folder, "float32")[1].parts
    ]
    assert torch.equal(logits(fresh), logits(model))


def test_a_file_of_another_packing_is_not_read(tmp_path: Path, parts: list[PackedTensor]) -> None:
    folder = tmp_path / "model"
    for dtype in ("bfloat16", "int8"):
        _, packed = load(folder, dtype, parts)
        _, fresh = load(folder, dtype)
        assert packed.num_packed == fresh.num_packed


def test_the_least_recently_used_make_room(
    tmp_path: Path, parts: list[PackedTensor], caplog: pytest.LogCaptureFixture
) -> None:
    size = sum(len(part.content) for part in parts)
    folder = tmp_path / "cache"
    caches = [WeightsCache(folder, bytes([n]) * 16, 3 * size) for n in range(3)]
    (folder / "mine.safetensors").parent.mkdir()
    (folder / "mine.safetensors").write_bytes(b"x" * 10)
    for age, cache in enumerate(caches[:2]):
        store(cache, parts)
        os.utime(cache.path, (age, age))
    assert caches[0].load()  # used again: younger than the other now
    store(caches[2], parts)
    assert [cache.path.is_file() for cache in caches] == [True, False, True]
    assert "removed" in caplog.text
    caplog.clear()
    small = WeightsCache(folder, KEY, size - 1)
    store(small, parts)
    assert not small.path.exists()
    assert "they are not stored" in caplog.text
    assert (folder / "mine.safetensors").is_file()
    assert sum(1 for _ in folder.iterdir()) == 3


def test_a_full_disk_ends_the_cache_alone(
    tmp_path: Path, parts: list[PackedTensor], caplog: pytest.LogCaptureFixture
) -> None:
    written = 0

    def write(descriptor: int, content: memoryview) -> int:
        nonlocal written
        if written > 200_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written += len(content)
        return os.write(descriptor, content)

    cache = WeightsCache(tmp_path / "cache", KEY, LIMIT, write=write)
    store(cache, parts)
    assert len(caplog.records) == 1
    assert "No space left on device; nothing is stored" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_short_writes_go_on(tmp_path: Path, parts: list[PackedTensor]) -> None:
    cache = WeightsCache(
        tmp_path / "cache", KEY, LIMIT, write=lambda descriptor, content: os.write(descriptor, content[:70_001])
    )
    store(cache, parts)
    assert [bytes(part.content) for part in cache.load()] == [bytes(part.content) for part in parts]


def test_a_folder_to_read_only(
    tmp_path: Path,
    cache: WeightsCache,
    parts: list[PackedTensor],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store(cache, parts)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert len(cache.load()) == len(parts)
    monkeypatch.setattr(os, "open", refuse)
    store(WeightsCache(cache.path.parent, OTHER_KEY, LIMIT), parts)
    assert "Read-only file system; nothing is stored" in caplog.text
    monkeypatch.undo()
    (tmp_path / "file").touch()
    store(WeightsCache(tmp_path / "file", KEY, LIMIT), parts)
    assert "nothing is stored" in caplog.records[-1].message


def test_what_a_dead_process_left_is_removed(cache: WeightsCache, parts: list[PackedTensor]) -> None:
    cache.path.parent.mkdir(parents=True)
    dead, alive = (cache.path.with_suffix(f".{pid}.part") for pid in (1, 2))
    dead.touch()
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store(cache, parts)
        assert sorted(cache.path.parent.iterdir()) == sorted([alive, cache.path])


def test_closing_gives_up_what_takes_too_long(tmp_path: Path, parts: list[PackedTensor]) -> None:
    cache = WeightsCache(tmp_path / "cache", KEY, LIMIT)
    cache._write = lambda descriptor, content: (cache._closed.set(), os.write(descriptor, content))[1]
    store(cache, parts)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_an_engine_with_a_cache(
    quantization: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    texts, lines = [], []
    for _ in range(2):
        with LLM(num_blocks=64, threads=1, quantization=quantization, weights_cache=str(tmp_path), verbose=True) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=8)
            texts.append(llm.generate("ROMEO:", params, use_tqdm=False)[0].outputs[0].text)
        lines.append(capsys.readouterr().err)
    assert texts[0] == texts[1]
    assert ["weights from the cache: " in text for text in lines] == [False, True]
    assert len(list(tmp_path.iterdir())) == 1
    assert caplog.records == []


def test_the_bytes_of_a_packed_weight_change_with_their_number_only() -> None:
    """If this fails, packing has changed: raise PACKING in quire/kernels/cpu.py and write the new digests here."""
    weight = torch.arange(-1300, 1300).view(40, 65) / 100
    digest = blake2b(digest_size=8)
    for dtype in ("float32", "float16", "bfloat16"):
        digest.update(cpu.pack_linear([weight], dtype).view(torch.uint8).numpy().data)
    whole = (torch.arange(40 * 64) % 16 - 8.0).view(40, 64)  # which 4 bits hold exactly, on every instruction set
    for each, stored in ((weight, METHODS["int8"].layers), (weight, WeightFormat(8, 32)), (whole, WeightFormat(4, 32))):
        packed = cpu.quantize_linear([each], stored)
        digest.update(packed.values.numpy().data)
        digest.update(packed.scales.view(torch.uint8).numpy().data)
    assert (cpu.PACKING, digest.hexdigest()) == (4, "864e45c98174a320")
