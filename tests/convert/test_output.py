"""Results exist whole or not at all, whatever ends their writing; targets are read, and refused in one line."""

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from quire.cli.commands import run
from quire.convert.block_writers import BLOCK_WRITERS
from quire.convert.output import unfinished
from quire.convert.target import BLOCKS, Target
from quire.errors import CheckpointError, ConfigError
from quire.models.safetensors_file import read_header
from quire.models.safetensors_writer import SafetensorsWriter
from tests.checkpoints import make_checkpoint


def test_a_result_takes_its_place_at_the_end(tmp_path: Path) -> None:
    with unfinished(tmp_path / "out") as folder:
        (folder / "out").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def leave(target: Path, fault: BaseException) -> None:
    with unfinished(target) as folder:
        (folder / "out").mkdir()
        raise fault


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), CheckpointError("no"), OSError(errno.ENOSPC, "No space left")])
def test_an_interruption_leaves_nothing(fault: BaseException, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError if isinstance(fault, OSError) else type(fault)):
        leave(tmp_path / "out", fault)
    assert list(tmp_path.iterdir()) == []


def test_a_termination_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "out"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left, alive = tmp_path / ".out.1.part", tmp_path / ".out.2.part"
    left.mkdir()
    alive.mkdir()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with unfinished(tmp_path / "out") as folder:
        (folder / "out").mkdir()
    os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "out"]


def test_what_another_process_made_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ConfigError, match="out exists by now"):
        make_beside(target)
    assert target.read_text() == "theirs"


def make_beside(target: Path) -> None:
    with unfinished(target) as folder:
        (folder / target.name).mkdir()
        target.write_text("theirs")


def test_a_full_disk_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    for to in ("int8", "bf16", "gguf"):
        assert run(["convert", str(folder), "--to", to, "--output", str(tmp_path / "out")]) == 3
        said = capsys.readouterr().err
        assert said == f"quire: {tmp_path}/out cannot be written: No space left on device; nothing is left of it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("to", "output", "said"),
    [
        ("int5", "new", "to is 'int5'; supported: int8, int4"),
        ("gguf:Q4_K_M", "new", "supported after gguf: are F32, F16"),
        ("gguf:", "new", "to is 'gguf:'"),
        ("int4", "old", "old exists; remove it"),
        ("int4", "none/new", "there is no folder"),
    ],
)
def test_what_is_refused(to: str, output: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    assert run(["convert", "", "--to", to, "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_every_type_that_can_be_asked_for_is_written() -> None:
    assert set(BLOCKS) == set(BLOCK_WRITERS)
    assert Target.parse("gguf") == Target.parse("gguf:q8_0")
    assert Target.parse("bfloat16") == Target.parse("bf16")


def test_tensors_are_split_into_files(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path, "model", max_file_bytes=100)
    content = {"a": bytes(64), "b": bytes(30), "c": bytes(90)}
    for name, value in content.items():
        writer.add(name, "U8", (len(value),), memoryview(value))
    where = writer.finish()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert where == {"a": first, "b": first, "c": second}
    assert sorted(path.name for path in tmp_path.iterdir()) == [first, second]
    assert {name: entry.shape for name, entry in read_header(tmp_path / second)[0].items()} == {"c": (90,)}
