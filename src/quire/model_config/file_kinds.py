"""What a file of a checkpoint is when it is not what its name says: the words for error messages."""

import os
from pathlib import Path

from quire.errors import CheckpointError

_NUM_READ = 64
"""Bytes that show what a file is."""
_FETCH = "download the file again"
_CONTENTS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs",),
        "is a pointer of git-lfs, not the file itself; run `git lfs pull` in its folder, or download it again",
    ),
    (
        (b"<!doctype", b"<html", b"<?xml"),
        f"is a web page, as a refused download leaves it; log in where it is needed, and {_FETCH}",
    ),
    ((b"gguf",), "is a GGUF file; give it a name that ends in .gguf and open that"),
    ((b"pk\x03\x04",), "is a zip archive, as torch.save and downloads of folders write it; unpack or convert it first"),
    (
        (b"\x80\x02}", b"\x80\x03}", b"\x80\x04\x95", b"\x80\x05\x95", b"\x80\x02\x8a"),
        "is a pickled file, which can run code; convert it to safetensors",
    ),
    ((b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"bzh", b"\xfd7zxz"), "is compressed; unpack it first"),
)
"""First bytes, in lower case → what is wrong."""


def is_file(path: Path) -> bool:
    """Whether there is a file. Raises `CheckpointError` for what has its name and cannot be read as one."""
    if path.is_file():
        return True
    reason = _not_a_file(path)
    if reason is not None:
        raise CheckpointError(f"{path} {reason}")
    return False


def describe_content(path: Path) -> str | None:
    """What a file is, if it is empty or of a kind that no file of a checkpoint has; None if that does not show."""
    with path.open("rb") as file:
        begin = file.read(_NUM_READ)
    if not begin:
        return f"is empty; {_FETCH}"
    begin = begin.lstrip().lower()
    return next((reason for starts, reason in _CONTENTS if begin.startswith(starts)), None)


def _not_a_file(path: Path) -> str | None:
    if path.is_symlink() and not path.exists():
        return (
            f"is a link to {os.readlink(path)}, which is not there; copy a folder together with what its links name "
            "(cp -rL), or download it again"
        )
    if path.is_dir():
        return "is a folder; expected a file"
    return "is no regular file" if path.exists() else None
